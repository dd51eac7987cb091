"""What lies in ZODB: extents, the tree over them, segments. Knows no mapping."""
