/* What Python sees of zbig.h; kept equal to it by the C compiler, which checks every line. */
#define ZB_PAGE ...
#define ZB_BLOCK ...
#define ZB_WANT_FILL ...
#define ZB_WANT_CHECK ...
#define ZB_WANT_NOTICE ...
#define ZB_DROP_HOLES ...

typedef struct zb_space zb_space;
typedef struct zb_window zb_window;

typedef struct {
    void *(*current)(void);
    void *(*this_thread)(void);
    size_t ident_offset;
    void *(*detach)(void);
    void (*attach)(void *);
} zb_hooks;
typedef struct {
    uint64_t start, stop;
    int64_t offset;
    int64_t fd;
} zb_piece;
typedef struct {
    uint64_t start, stop, offset;
    uint64_t file;
} zb_run;
typedef struct {
    uint64_t space, position, thread;
    uint32_t want;
    int32_t error;
    uint64_t answer;
} zb_request;
typedef struct {
    uint64_t read_faults, write_faults, bus_faults, spurious, chained;
    uint64_t waits, fills, stale_fills, bytes_copied, overflows, writebacks;
    uint64_t mappings;
} zb_count;

int zb_init(const zb_hooks *hooks);
int zb_handlers(void);
int zb_handlers_off(void);
void zb_shutdown(void);
void zb_counters(zb_count *out);
void zb_mappings_set(uint64_t n);
int zb_poison_fd(void);

int zb_space_new(zb_space **out, uint64_t id, const char *directory, const char *prefix);
int zb_space_scratch(zb_space *s, const char *directory);
void zb_space_transient(zb_space *s, int transient);
void zb_space_limit(zb_space *s, uint64_t bytes);
void zb_space_close(zb_space *s);
void zb_space_free(zb_space *s);
uint64_t zb_space_epoch(zb_space *s);
int zb_space_error(zb_space *s);
void zb_space_fail(zb_space *s, int error);
uint64_t zb_space_dirty(zb_space *s);

int zb_window_new(zb_window **out, zb_space *s, uint64_t start, uint64_t length);
char *zb_window_base(zb_window *w);
void zb_window_free(zb_window *w);
int zb_fill(zb_window *w, uint64_t epoch, uint64_t lo, uint64_t hi, const zb_piece *pieces, size_t n);
int zb_lost(zb_window *w, int error);
uint64_t zb_absent(zb_window *w, uint64_t lo, uint64_t hi);
uint64_t zb_present(zb_window *w, uint64_t lo, uint64_t hi);
int zb_ready(zb_window *w, uint64_t lo, uint64_t hi);
int zb_release(zb_window *w);

int zb_drop(zb_space *s, uint64_t lo, uint64_t hi, unsigned flags);
int zb_freeze(zb_space *s, zb_run **runs, size_t *n, uint64_t *first, uint64_t *last);
int zb_resume(zb_space *s, uint64_t file);
void zb_runs_free(zb_run *runs);
int zb_discard(zb_space *s, uint64_t *first, uint64_t *last);
int zb_write(zb_window *w, uint64_t lo, uint64_t hi, const void *source);

void zb_loaders_come(void);
int zb_request_next(zb_request *out);
void zb_request_told(const zb_request *r);
void zb_collecting(const wchar_t *phase, const void *info);
void zb_patience(uint32_t milliseconds);
