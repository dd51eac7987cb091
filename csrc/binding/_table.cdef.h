/* What Python sees of table.h. */
#define ZT_ROW ...

int zt_columns(const void *extents, size_t n, const uint64_t *lengths, size_t count, uint64_t base, void *out);
void zt_moved_columns(const void *moved, size_t k, uint64_t base, void *out);
int zt_rows(const void *columns, size_t n, size_t count, uint64_t base, void *extents, uint64_t *lengths,
            uint64_t *most);
int64_t zt_put(const void *extents, size_t n, size_t count, uint64_t start, uint64_t stop, uint64_t offset,
               void *out, uint32_t *order, size_t *used);
