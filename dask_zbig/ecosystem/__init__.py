"""Other libraries' data models on stored arrays. Each module needs its library; nothing else here does."""
