"""The Python side of ``csrc``: bytes of files in the process's address space. Knows no ZODB."""
