/* SPDX-License-Identifier: MIT
 * test_write.c - dirty pages: write faults, aliasing, generations, direct writes. With the argument "model":
 * random operations against a plain array (further arguments: the seed, the number of steps). */
#define _GNU_SOURCE
#include "fixture.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <sys/stat.h>

#define P ZB_PAGE
#define B ZB_BLOCK
#define ID 1

static zb_space *s;
static zb_window *w;
static char *base;
static uint64_t first, last;
static zb_run *runs;
static size_t nruns;

static void begin(uint64_t blocks)
{
    s = fx_space(ID);
    w = fx_window(s, 0, blocks * B);
    base = zb_window_base(w);
}

static void freeze(void)
{
    CHECK_OK(zb_freeze(s, &runs, &nruns, &first, &last));
}

/* Free the frozen runs and unlink their files. */
static void forget(void)
{
    zb_runs_free(runs);
    fx_scratch_remove(ID, first, last);
}

static void discard(void)
{
    CHECK_OK(zb_discard(s, &first, &last));
    fx_scratch_remove(ID, first, last);
}

static void end(void)
{
    discard();
    zb_window_free(w);
    zb_space_free(s);
}

static uint64_t write_faults(void)
{
    return fx_count().write_faults;
}

/* -- one fault ------------------------------------------------------------------------------------------------ */

static void on_a_hole(void)
{
    begin(2);
    CHECK_OK(fx_fill(s, w, 0, 2 * B, -1, 0));
    fx_put(base + B + 3 * P + 7, 42);
    CHECK_EQ(zb_space_dirty(s), 1);
    CHECK_EQ(zb_space_error(s), 0);
    CHECK_EQ(fx_get(base + B + 3 * P + 7), 42);
    fx_check_all(base, B + 3 * P + 7, 0);
    fx_check_all(base + B + 3 * P + 8, B - 3 * P - 8, 0);
    end();
}

static void on_clean_pages_keeps_the_old_bytes(void)
{
    begin(2);
    int fd = fx_file(2 * B + P, 1);
    CHECK_OK(fx_fill(s, w, 0, 2 * B, fd, P));
    uint64_t copied = fx_count().bytes_copied;
    fx_put(base + 5 * P, 42);
    fx_put(base + 2 * B - 1, 43);
    CHECK_EQ(zb_space_dirty(s), 2);
    CHECK_EQ(fx_count().bytes_copied - copied, 2 * P);
    CHECK_EQ(fx_get(base + 5 * P), 42);
    CHECK_EQ(fx_get(base + 2 * B - 1), 43);
    fx_check_file(base, 5 * P, 1, P);
    fx_check_file(base + 5 * P + 1, 2 * B - 5 * P - 2, 1, 6 * P + 1);
    CHECK(fx_writable(base + 5 * P) && !fx_writable(base + 4 * P) && !fx_writable(base + 6 * P));
    close(fd);
    end();
}

static void blocks_of_file_and_hole(void)
{
    begin(1);
    int fd = fx_file(B, 1);
    zb_piece pieces[] = {{0, 4 * P, 0, -1}, {4 * P, 8 * P, 0, fd}, {8 * P, B, 0, -1}};
    CHECK_OK(zb_fill(w, zb_space_epoch(s), 0, B, pieces, 3));
    CHECK_OK(zb_write(w, 2 * P + 1, 10 * P - 1, NULL));
    CHECK_EQ(zb_space_dirty(s), 8);
    fx_check_all(base, 4 * P, 0);
    fx_check_file(base + 4 * P, 4 * P, 1, 0);
    fx_check_all(base + 8 * P, B - 8 * P, 0);
    close(fd);
    end();
}

/* -- the unit ------------------------------------------------------------------------------------------------- */

static void sequential(int fd)
{
    const uint64_t size = 64 << 20;
    begin(size / B);
    CHECK_OK(fx_fill(s, w, 0, size, fd, 0));
    uint64_t before = write_faults();
    for (uint64_t at = 0; at < size; at += 8) fx_put(base + at, (unsigned char)(at / 8));
    CHECK_LE(write_faults() - before, 64);
    CHECK_EQ(zb_space_dirty(s), size / P);
    for (uint64_t at = 0; at < size; at += 8) CHECK_EQ(fx_get(base + at), (unsigned char)(at / 8));
    CHECK_EQ(fx_get(base + size - 1), fd < 0 ? 0 : fx_byte(1, size - 1));
    end();
}

static void sequential_on_a_hole(void)
{
    sequential(-1);
}

static void sequential_on_clean_pages(void)
{
    int fd = fx_file(64 << 20, 1);
    sequential(fd);
    close(fd);
}

/* Several writers that go on side by side do not stop each other's unit from growing. */
static void sequential_streams(void)
{
    begin(32);
    CHECK_OK(fx_fill(s, w, 0, 32 * B, -1, 0));
    uint64_t before = write_faults();
    for (uint64_t at = 0; at < 8 * B; at += P)
        for (uint64_t k = 0; k < 4; k++) fx_put(base + k * 8 * B + at, 1);
    CHECK_LE(write_faults() - before, 4 * (8 + 10)); /* one a block, and ten to get there */
    end();
}

static void random_pages(void)
{
    begin(64);
    int fd = fx_file(64 * B, 1);
    CHECK_OK(fx_fill(s, w, 0, 64 * B, fd, 0));
    static bool written[64 * B / P];
    fx_random r = {5};
    uint64_t touched = 0, page = 0;
    for (int i = 0; i < 2000; i++) {
        page = (page + 2 + fx_below(&r, 64 * B / P - 4)) % (64 * B / P); /* never the next one */
        touched += !written[page];
        written[page] = true;
        fx_put(base + page * P + page % P, 42);
    }
    CHECK_LE(touched, zb_space_dirty(s));
    CHECK_LE(zb_space_dirty(s), touched + 100); /* it may look sequential by chance */
    for (page = 0; page < 64 * B / P; page++) {
        CHECK_EQ(fx_get(base + page * P + page % P), written[page] ? 42 : fx_byte(1, page * P + page % P));
        CHECK_EQ(fx_get(base + page * P + (page + 1) % P), fx_byte(1, page * P + (page + 1) % P));
    }
    CHECK_LE(fx_mappings(base, 64 * B), fx_count().mappings);
    close(fd);
    end();
}

static void the_limit(void)
{
    begin(3);
    CHECK_OK(fx_fill(s, w, 0, 3 * B, -1, 0));
    zb_space_limit(s, B + 100 * P + 1);
    for (uint64_t at = 0; at < B + 100 * P + 1; at += P) fx_put(base + at, 1);
    CHECK_EQ(zb_space_dirty(s), B / P + 101);
    fx_put(base + B + 101 * P, 1); /* past it, page by page */
    CHECK_EQ(zb_space_dirty(s), B / P + 102);
    fx_put(base + B + 102 * P, 1);
    CHECK_EQ(zb_space_dirty(s), B / P + 103);
    end();
}

static void the_unit_widens_before_mappings_run_out(void)
{
    begin(4);
    uint64_t before = fx_count().mappings;
    CHECK_OK(fx_fill(s, w, 0, 4 * B, -1, 0));
    zb_mappings_set(20000);
    fx_put(base + 40 * P, 1);
    CHECK_EQ(zb_space_dirty(s), 16);
    CHECK(fx_writable(base + 32 * P) && fx_writable(base + 47 * P) && !fx_writable(base + 48 * P));
    zb_mappings_set(60000);
    fx_put(base + B + 40 * P, 1);
    CHECK_EQ(zb_space_dirty(s), 16 + B / P);
    zb_mappings_set(before);
    fx_put(base + 2 * B + 40 * P, 1);
    CHECK_EQ(zb_space_dirty(s), 16 + B / P + 1);
    end();
}

/* Whole blocks here and there split a mapping as pages do. */
static void whole_blocks_are_counted(void)
{
    uint64_t before = fx_count().mappings;
    begin(400);
    CHECK_OK(fx_fill(s, w, 0, 400 * B, -1, 0));
    for (uint64_t b = 0; b < 40; b += 2) CHECK_OK(zb_write(w, b * B, (b + 1) * B, NULL));
    CHECK_LE(fx_mappings(base, 400 * B), fx_count().mappings - before);
    discard();
    CHECK_LE(fx_mappings(base, 400 * B), fx_count().mappings - before);
    end();
    CHECK_EQ(fx_count().mappings, before);
}

/* -- several windows ------------------------------------------------------------------------------------------ */

static void writes_show_in_every_window(void)
{
    begin(4);
    int fd = fx_file(8 * B, 1);
    zb_window *v = fx_window(s, 2 * B, 4 * B);
    char *other = zb_window_base(v) - 2 * B;
    CHECK_OK(fx_fill(s, w, 0, 4 * B, fd, 0));
    fx_put(base + 2 * B + 5 * P, 1); /* the other has this block still absent */
    CHECK_EQ(fx_get(other + 2 * B + 5 * P), 1);
    CHECK_EQ(zb_absent(v, 2 * B, 6 * B), 2 * B);
    fx_put(other + 2 * B + 5 * P + 1, 2);
    CHECK_EQ(fx_get(base + 2 * B + 5 * P + 1), 2);
    CHECK_OK(fx_fill(s, v, 2 * B, 6 * B, fd, 2 * B)); /* leaves the dirty page */
    CHECK_EQ(fx_get(other + 2 * B + 5 * P), 1);
    fx_check_file(other + 2 * B + 6 * P, B - 6 * P, 1, 2 * B + 6 * P);
    fx_put(other + 3 * B, 3);
    CHECK_EQ(fx_get(base + 3 * B), 3);
    fx_put(other + 5 * B, 4); /* where the first has no block */
    CHECK_EQ(zb_space_dirty(s), 3);
    CHECK_OK(zb_drop(s, 0, 8 * B, 0));
    CHECK_EQ(fx_get(base + 3 * B), 3);
    CHECK_EQ(fx_get(other + 3 * B), 3);
    freeze();
    CHECK_EQ(nruns, 3);
    CHECK(!fx_writable(base + 3 * B) && !fx_writable(other + 3 * B));
    CHECK_EQ(fx_get(other + 5 * B), 4);
    forget();
    zb_window_free(v);
    close(fd);
    end();
}

static void a_window_made_after_writing(void)
{
    begin(40);
    CHECK_OK(fx_fill(s, w, 0, 40 * B, -1, 0));
    for (uint64_t b = 0; b < 40; b++) fx_put(base + b * B + b * P, (unsigned char)(b + 1)); /* two files */
    zb_window *v = fx_window(s, 3 * B, 50 * B);
    char *other = zb_window_base(v) - 3 * B;
    CHECK_EQ(zb_absent(v, 3 * B, 50 * B), 3 * B);
    for (uint64_t b = 3; b < 40; b++) CHECK_EQ(fx_get(other + b * B + b * P), b + 1);
    fx_put(other + 3 * B + 3 * P, 99);
    CHECK_EQ(fx_get(base + 3 * B + 3 * P), 99);
    CHECK_OK(fx_fill(s, v, 3 * B, 53 * B, -1, 0));
    CHECK_EQ(fx_get(other + 3 * B + 3 * P), 99);
    CHECK_EQ(fx_get(other + 3 * B + 4 * P), 0);
    fx_put(other + 3 * B + 4 * P, 98);
    CHECK_EQ(fx_get(base + 3 * B + 4 * P), 98);
    zb_window_free(v);
    end();
}

/* -- generations ---------------------------------------------------------------------------------------------- */

static void freeze_of_nothing(void)
{
    begin(1);
    freeze();
    CHECK_EQ(nruns, 0);
    CHECK_EQ(first, last);
    forget();
    end();
}

static void freeze_tells_where_the_bytes_lie(void)
{
    begin(4);
    int fd = fx_file(4 * B, 1);
    CHECK_OK(fx_fill(s, w, 0, 4 * B, fd, 0));
    fx_put(base + 2 * B + 9 * P, 9); /* out of order */
    fx_put(base + 7 * P + 1, 7);
    CHECK_OK(zb_write(w, 2 * B + 20 * P, 2 * B + 30 * P, NULL));
    freeze();
    CHECK_EQ(nruns, 3);
    CHECK_EQ(last - first, 1);
    CHECK_EQ(zb_space_dirty(s), 0);
    CHECK_EQ(runs[0].start, 7 * P);
    CHECK_EQ(runs[0].stop, 8 * P);
    CHECK_EQ(runs[1].start, 2 * B + 9 * P);
    CHECK_EQ(runs[2].stop, 2 * B + 30 * P);
    int scratch = fx_scratch_open(ID, first);
    char page[P];
    struct stat st;
    CHECK_SYS(fstat(scratch, &st));
    CHECK_EQ(st.st_mode & 0777, 0600);
    for (size_t i = 0; i < nruns; i++)
        for (uint64_t at = runs[i].start; at < runs[i].stop; at += P) {
            CHECK_EQ(pread(scratch, page, P, (off_t)(runs[i].offset + at - runs[i].start)), P);
            fx_check_same(page, base + at, P, at);
        }
    close(scratch);
    fx_check_file(base, 7 * P, 1, 0);
    CHECK_EQ(fx_get(base + 7 * P + 1), 7);
    forget();
    close(fd);
    end();
}

static void the_next_generation_has_a_new_file(void)
{
    begin(1);
    CHECK_OK(fx_fill(s, w, 0, B, -1, 0));
    fx_put(base + 5 * P, 1);
    freeze();
    uint64_t old_first = first, old_last = last;
    zb_runs_free(runs);
    CHECK(!fx_writable(base + 5 * P));
    CHECK_EQ(zb_absent(w, 0, B), B);
    fx_put(base + 5 * P, 2);
    fx_put(base + 6 * P, 3);
    freeze();
    CHECK_EQ(first, old_last);
    int a = fx_scratch_open(ID, old_first), b = fx_scratch_open(ID, first);
    char byte;
    CHECK_EQ(pread(a, &byte, 1, 5 * P), 1);
    CHECK_EQ(byte, 1);
    CHECK_EQ(pread(b, &byte, 1, 5 * P), 1);
    CHECK_EQ(byte, 2);
    close(a);
    close(b);
    forget();
    fx_scratch_remove(ID, old_first, old_last);
    CHECK_EQ(fx_get(base + 5 * P), 2); /* unlinked, but mapped */
    end();
}

static void runs_of_neighbours_are_joined(void)
{
    begin(40);
    CHECK_OK(fx_fill(s, w, 0, 40 * B, -1, 0));
    CHECK_OK(zb_write(w, B - P, 36 * B, NULL));
    freeze();
    CHECK_EQ(nruns, 2); /* block 32 is the first in the second file */
    CHECK_EQ(runs[0].start, B - P);
    CHECK_EQ(runs[0].stop, 32 * B);
    CHECK_EQ(runs[1].stop, 36 * B);
    CHECK_EQ(runs[1].offset, 0);
    CHECK_EQ(runs[1].file, runs[0].file + 1);
    forget();
    end();
}

static void files_rotate(void)
{
    begin(70);
    CHECK_OK(fx_fill(s, w, 0, 70 * B, -1, 0));
    for (uint64_t b = 0; b < 70; b++) fx_put(base + b * B, (unsigned char)(b + 1));
    fx_put(base + 9 * P, 77); /* the block's slot lies in a file that is closed already */
    CHECK_OK(zb_write(w, 33 * B + 4 * P, 33 * B + 6 * P, NULL));
    freeze();
    CHECK_EQ(last - first, 3);
    CHECK_EQ(nruns, 72);
    for (size_t i = 0; i < nruns; i++) {
        int fd = fx_scratch_open(ID, runs[i].file);
        char byte;
        CHECK_EQ(runs[i].file, first + runs[i].start / B / ZB_SLOTS_PER_FILE);
        CHECK_EQ(pread(fd, &byte, 1, (off_t)runs[i].offset), 1);
        CHECK_EQ(byte, base[runs[i].start]);
        close(fd);
    }
    CHECK_EQ(fx_get(base + 9 * P), 77);
    forget();
    end();
}

static void discarded_bytes_are_gone(void)
{
    begin(40);
    int fd = fx_file(40 * B, 1);
    CHECK_OK(fx_fill(s, w, 0, 40 * B, fd, 0));
    uint64_t epoch = zb_space_epoch(s);
    for (uint64_t b = 0; b < 40; b += 2) fx_put(base + b * B, (unsigned char)~fx_byte(1, b * B));
    CHECK_OK(zb_discard(s, &first, &last));
    CHECK(zb_space_epoch(s) != epoch);
    CHECK_EQ(last - first, 1);
    CHECK_EQ(zb_space_dirty(s), 0);
    fx_scratch_remove(ID, first, last);
    for (uint64_t b = 0; b < 40; b++) CHECK_EQ(zb_absent(w, b * B, (b + 1) * B), b % 2 ? (b + 1) * B : b * B);
    CHECK_OK(fx_fill(s, w, 0, 40 * B, fd, 0));
    for (uint64_t b = 0; b < 40; b++) CHECK_EQ(fx_get(base + b * B), fx_byte(1, b * B));
    fx_put(base, 1);
    CHECK_OK(zb_discard(s, &first, &last));
    CHECK_EQ(last - first, 1);
    fx_scratch_remove(ID, first, last);
    close(fd);
    end();
}

static void the_scratch_directory_moves_between_generations(void)
{
    begin(40);
    char other[4096];
    snprintf(other, sizeof other, "%s/../%s", fx_directory(), strrchr(fx_directory(), '/') + 1);
    CHECK_OK(fx_fill(s, w, 0, 40 * B, -1, 0));
    for (uint64_t b = 0; b < 40; b++) fx_put(base + b * B, 1);
    CHECK_EQ(zb_space_scratch(s, "/nonexistent"), -EBUSY); /* its first file is opened again by name */
    fx_put(base + 10 * P, 1);
    CHECK_EQ(zb_space_error(s), 0);
    freeze();
    CHECK_OK(zb_space_scratch(s, other));
    forget();
    fx_put(base, 2);
    CHECK_EQ(zb_space_error(s), 0);
    end();
}

static uint64_t offset; /* where in it */

/* A generation of one page, in a file that keeps its name; its number. */
static uint64_t one_page(uint64_t block, unsigned char byte)
{
    fx_put(base + block * B + 3 * P, byte);
    freeze();
    CHECK_EQ(nruns, 1);
    CHECK_EQ(last - first, 1);
    offset = runs[0].offset;
    zb_runs_free(runs);
    return first;
}

static unsigned char in_file(uint64_t number, uint64_t place)
{
    unsigned char byte;
    int fd = fx_scratch_open(ID, number);
    CHECK_EQ(pread(fd, &byte, 1, (off_t)place), 1);
    close(fd);
    return byte;
}

static void a_generation_goes_on_in_the_file_of_the_one_before(void)
{
    begin(40);
    CHECK_OK(fx_fill(s, w, 0, 40 * B, -1, 0));
    uint64_t file = one_page(0, 1);
    for (unsigned n = 1; n < ZB_SLOTS_PER_FILE; n++) {
        CHECK_OK(zb_resume(s, file));
        CHECK_EQ(zb_resume(s, file), -EBUSY);
        CHECK_EQ(one_page(n % 3, (unsigned char)(n + 1)), file);
        CHECK_EQ(offset, n * B + 3 * P); /* behind what lies there */
    }
    for (unsigned n = 0; n < ZB_SLOTS_PER_FILE; n++) CHECK_EQ(in_file(file, n * B + 3 * P), n + 1);
    CHECK_EQ(zb_resume(s, file), -ENOSPC);
    uint64_t next = one_page(0, 99);
    CHECK_EQ(next, file + 1);
    CHECK_EQ(zb_resume(s, file), -EINVAL);
    fx_put(base, 7);
    CHECK_EQ(zb_resume(s, next), -EBUSY);
    fx_scratch_remove(ID, file, next + 1);
    CHECK_EQ(fx_get(base + 3 * P), 99);
    end();
}

static void what_is_large_gets_a_file_of_its_own(void)
{
    begin(40);
    CHECK_OK(fx_fill(s, w, 0, 40 * B, -1, 0));
    uint64_t file = one_page(0, 1);
    CHECK_OK(zb_resume(s, file));
    CHECK_OK(zb_write(w, 0, 8 * B, NULL));
    freeze();
    CHECK_EQ(first, file);
    CHECK_EQ(last, file + 2);
    CHECK_EQ(nruns, 2);
    CHECK_EQ(runs[0].stop, 4 * B);
    CHECK_EQ(runs[0].offset, B);
    CHECK_EQ(runs[1].offset, 0);
    forget();
    end();
}

static void a_file_that_was_to_be_resumed_and_is_gone(void)
{
    begin(4);
    CHECK_OK(fx_fill(s, w, 0, 4 * B, -1, 0));
    uint64_t file = one_page(0, 1);
    CHECK_OK(zb_resume(s, file));
    fx_scratch_remove(ID, file, file + 1);
    CHECK_EQ(one_page(1, 2), file + 1);
    CHECK_EQ(zb_space_error(s), 0);
    CHECK_EQ(fx_get(base + 3 * P), 1);
    CHECK_EQ(fx_get(base + B + 3 * P), 2);
    fx_scratch_remove(ID, file + 1, file + 2);
    end();
}

static void a_resumed_file_is_discarded_with_its_generation(void)
{
    begin(4);
    CHECK_OK(fx_fill(s, w, 0, 4 * B, -1, 0));
    uint64_t file = one_page(0, 1);
    CHECK_OK(zb_resume(s, file));
    CHECK_OK(zb_discard(s, &first, &last)); /* nothing was written */
    CHECK_EQ(first, last);
    CHECK_EQ(zb_resume(s, file), -EINVAL);
    fx_scratch_remove(ID, file, file + 1);
    file = one_page(0, 2);
    CHECK_OK(zb_resume(s, file));
    fx_put(base, 3);
    CHECK_OK(zb_discard(s, &first, &last));
    CHECK_EQ(first, file);
    CHECK_EQ(last, file + 1);
    CHECK_EQ(zb_resume(s, file), -EINVAL);
    fx_scratch_remove(ID, first, last);
    CHECK_EQ(one_page(1, 4), file + 1);
    fx_scratch_remove(ID, file + 1, file + 2);
    end();
}

/* -- direct writes -------------------------------------------------------------------------------------------- */

static void direct_write_without_source(void)
{
    begin(3);
    int fd = fx_file(3 * B, 1);
    CHECK_EQ(zb_write(w, 0, 1, NULL), -EAGAIN);
    CHECK_OK(fx_fill(s, w, 0, 2 * B, fd, 0));
    CHECK_EQ(zb_write(w, B + 1, 2 * B + 1, NULL), -EAGAIN);
    CHECK_EQ(zb_space_dirty(s), B / P); /* what was done is kept */
    uint64_t before = write_faults();
    CHECK_OK(zb_write(w, P + 1, 3 * P - 1, NULL));
    CHECK_OK(zb_write(w, 5 * P, 5 * P, NULL));
    CHECK_EQ(zb_space_dirty(s), B / P + 2);
    CHECK(!fx_writable(base) && fx_writable(base + P) && fx_writable(base + 2 * P) && !fx_writable(base + 3 * P));
    fx_put(base + 2 * P, 1);
    CHECK_EQ(write_faults(), before);
    fx_check_file(base, 2 * P, 1, 0);
    CHECK_EQ(zb_write(w, 0, 3 * B + 1, NULL), -EINVAL);
    CHECK_EQ(zb_write(w, B, 0, NULL), -EINVAL);
    close(fd);
    end();
}

static void direct_write_with_source(void)
{
    begin(3);
    int fd = fx_file(3 * B, 1);
    static char source[2 * B];
    for (uint64_t i = 0; i < 2 * B; i++) source[i] = (char)fx_byte(2, i);
    CHECK_OK(zb_write(w, B - 2 * P, 2 * B + 5 * P, source)); /* the blocks are absent */
    CHECK_EQ(zb_absent(w, 0, 3 * B), 0);
    fx_check_file(base + B - 2 * P, B + 7 * P, 2, 0);
    CHECK_OK(fx_fill(s, w, 0, 3 * B, fd, 0));
    fx_check_file(base + B - 2 * P, B + 7 * P, 2, 0);
    fx_check_file(base, B - 2 * P, 1, 0);
    fx_check_file(base + 2 * B + 5 * P, B - 5 * P, 1, 2 * B + 5 * P);
    CHECK_OK(zb_write(w, B - 3 * P, B + P, source)); /* over pages that are partly dirty */
    fx_check_file(base + B - 3 * P, 4 * P, 2, 0);
    fx_check_file(base + B + P, B + 4 * P, 2, 3 * P);
    CHECK_EQ(zb_write(w, 1, P, source), -EINVAL);
    CHECK_EQ(zb_write(w, 0, P + 1, source), -EINVAL);
    CHECK_OK(zb_write(w, 0, P, base + B)); /* from a view of itself */
    fx_check_file(base, P, 2, 3 * P);
    freeze();
    CHECK_EQ(nruns, 2);
    forget();
    close(fd);
    end();
}

static bool readable(const char *page)
{
    int ends[2];
    CHECK_SYS(pipe(ends));
    ssize_t n = write(ends[1], page, 1);
    CHECK(n == 1 || errno == EFAULT);
    close(ends[0]);
    close(ends[1]);
    return n == 1;
}

/* It counts as filled: nobody asks for the old bytes, neither now nor when it is frozen. */
static void direct_write_of_absent_blocks(void)
{
    begin(4);
    zb_window *v = fx_window(s, B, 3 * B);
    static char source[2 * B];
    memset(source, 5, sizeof source);
    CHECK_OK(zb_write(w, B + P, 3 * B, source)); /* all of block 2, not all of block 1 */
    CHECK_EQ(zb_absent(w, B, 4 * B), B);
    CHECK_EQ(zb_absent(w, 2 * B, 4 * B), 3 * B);
    CHECK_EQ(zb_absent(v, 2 * B, 4 * B), 3 * B);
    fx_check_all(zb_window_base(v) + P, 2 * B - P, 5);
    CHECK_OK(zb_write(w, B, B + P, source));
    CHECK_EQ(zb_absent(v, B, 4 * B), 3 * B);
    freeze();
    forget();
    CHECK_EQ(zb_absent(w, B, 4 * B), 3 * B);
    CHECK(readable(base + 3 * B - P) && !fx_writable(base + 3 * B - P));
    fx_put(base + B + 7, 6); /* a write fault on what was frozen, with nobody there to load it */
    CHECK_EQ(fx_get(zb_window_base(v) + 7), 6);
    CHECK_EQ(fx_get(zb_window_base(v) + 8), 5);
    discard();
    CHECK(!readable(base + B) && readable(base + 2 * B));
    zb_window_free(v);
    end();
}

/* What is frozen in a block that is not filled shows until it is dropped, and no longer. */
static void drop_of_what_an_absent_block_shows(void)
{
    begin(2);
    zb_window *v = fx_window(s, 0, 2 * B);
    char *other = zb_window_base(v);
    static char source[P];
    CHECK_OK(fx_fill(s, w, B, 2 * B, -1, 0));
    CHECK_OK(zb_write(w, 3 * P, 4 * P, source));
    fx_put(base + B, 1); /* in the other window the block is absent */
    freeze();
    forget();
    CHECK(readable(base + 3 * P) && !readable(base + 4 * P) && readable(other + B) && !readable(other + B + P));
    CHECK_OK(zb_drop(s, 0, 2 * B, 0));
    CHECK(!readable(base + 3 * P) && !readable(other + 3 * P) && !readable(base + B) && !readable(other + B));
    zb_window_free(v);
    end();
}

/* Pages that are dirty already stay mapped as they are. */
static void direct_write_of_dirty_pages(void)
{
    begin(2);
    zb_window *v = fx_window(s, 0, 2 * B);
    char *other = zb_window_base(v);
    static char source[2 * B];
    memset(source, 5, sizeof source);
    CHECK_OK(zb_write(w, 0, B + 9 * P, source));
    CHECK_EQ(fx_get(other + P), 5);
    CHECK(fx_resident(other + P));
    memset(source, 6, sizeof source);
    CHECK_OK(zb_write(v, 0, B, source));
    CHECK(fx_resident(other + P));
    CHECK_OK(zb_write(v, B, 2 * B, source)); /* some of them are, some not */
    fx_check_all(base, 2 * B, 6);
    fx_check_all(other, 2 * B, 6);
    CHECK_EQ(zb_space_dirty(s), 2 * B / P);
    zb_window_free(v);
    end();
}

static void *read_five(void *at)
{
    CHECK_EQ(fx_get(at), 5);
    return NULL;
}

static void direct_write_wakes_who_waits_for_a_fill(void)
{
    begin(1);
    static char source[B];
    pthread_t reader;
    memset(source, 5, sizeof source);
    uint64_t waits = fx_count().waits;
    CHECK_OK(pthread_create(&reader, NULL, read_five, base + 9 * P));
    while (fx_count().waits == waits) sched_yield();
    CHECK_OK(zb_write(w, 0, B, source));
    CHECK_OK(pthread_join(reader, NULL));
    int fd = fx_file(B, 1);
    CHECK_OK(fx_fill(s, w, 0, B, fd, 0)); /* its fill comes late, and changes nothing */
    fx_check_all(base, B, 5);
    close(fd);
    end();
}

static void a_generation_that_is_said_to_have_failed(void)
{
    begin(1);
    CHECK_OK(fx_fill(s, w, 0, B, -1, 0));
    fx_put(base, 1);
    zb_space_fail(s, ENOSPC);
    zb_space_fail(s, EIO);
    CHECK_EQ(zb_space_error(s), ENOSPC);
    CHECK_EQ(zb_freeze(s, &runs, &nruns, &first, &last), -ENOSPC);
    discard();
    CHECK_EQ(zb_space_error(s), 0);
    end();
}

static void direct_write_from_an_absent_view(void)
{
    begin(2);
    CHECK_OK(fx_fill(s, w, 0, B, -1, 0));
    CHECK_EQ(zb_write(w, 0, P, base + B), -EFAULT);
    CHECK_EQ(zb_space_error(s), 0);
    fx_check_all(base, B, 0);
    CHECK_EQ(zb_space_dirty(s), 0);
    end();
}

static void direct_write_when_closed(void)
{
    begin(1);
    CHECK_OK(fx_fill(s, w, 0, B, -1, 0));
    zb_space_close(s);
    CHECK_EQ(zb_write(w, 0, P, NULL), -ENOTCONN);
    end();
}

/* -- model ---------------------------------------------------------------------------------------------------- */

enum { BLOCKS = 6 };
#define SIZE (BLOCKS * B)

static struct {
    fx_random random;
    fx_store store;
    unsigned char *now, *saved; /* what views must show; what is committed */
    zb_window *windows[2];
    uint64_t starts[2], lengths[2];
    zb_piece pieces[SIZE / P];
} m;

static uint64_t any(uint64_t limit)
{
    return fx_below(&m.random, limit);
}

/* Fill the blocks of [lo, hi) and perhaps some around it. */
static void model_fill(int k, uint64_t lo, uint64_t hi)
{
    uint64_t end_ = m.starts[k] + m.lengths[k];
    lo = lo / B * B;
    hi = (hi + B - 1) / B * B;
    if (any(4) == 0 && lo > m.starts[k]) lo -= B;
    if (any(4) == 0 && hi < end_) hi += B;
    size_t n = fx_store_pieces(&m.store, lo, hi, m.pieces);
    CHECK_OK(zb_fill(m.windows[k], zb_space_epoch(s), lo, hi, m.pieces, n));
    CHECK_EQ(zb_absent(m.windows[k], lo, hi), hi);
}

/* A window, and a range in it of a few bytes, or pages, or anything. */
static int model_range(uint64_t *lo, uint64_t *hi)
{
    int k = (int)any(2);
    uint64_t most = (uint64_t[]){16, 3 * P, 40 * P, m.lengths[k]}[any(8) % 4];
    *lo = m.starts[k] + any(m.lengths[k]);
    *hi = *lo + 1 + any(most);
    if (*hi > m.starts[k] + m.lengths[k]) *hi = m.starts[k] + m.lengths[k];
    return k;
}

static char *model_at(int k, uint64_t position)
{
    return zb_window_base(m.windows[k]) + (position - m.starts[k]);
}

static void model_check(int k, uint64_t lo, uint64_t hi)
{
    model_fill(k, lo, hi);
    fx_check_same(model_at(k, lo), m.now + lo, hi - lo, lo);
}

static void model_store(uint64_t lo, uint64_t hi)
{
    for (uint64_t at = lo; at < hi; at++) m.now[at] = (unsigned char)fx_next(&m.random);
}

static void model_write(void)
{
    uint64_t lo, hi;
    int k = model_range(&lo, &hi);
    if (hi - lo > B && any(4)) hi = lo + B; /* long ones cost time */
    model_fill(k, lo, hi);
    model_store(lo, hi);
    memcpy(model_at(k, lo), m.now + lo, hi - lo);
}

static void model_direct_write(void)
{
    uint64_t lo, hi;
    int k = model_range(&lo, &hi);
    if (any(2)) { /* with source, wherever it is */
        lo = lo / P * P;
        hi = (hi + P - 1) / P * P;
        model_store(lo, hi);
        CHECK_OK(zb_write(m.windows[k], lo, hi, m.now + lo));
        return;
    }
    int r = zb_write(m.windows[k], lo, hi, NULL);
    if (r == -EAGAIN) {
        model_fill(k, lo, hi);
        r = zb_write(m.windows[k], lo, hi, NULL);
    }
    CHECK_OK(r);
    fx_check_same(model_at(k, lo), m.now + lo, hi - lo, lo);
}

static void model_freeze(void)
{
    uint64_t dirty = zb_space_dirty(s);
    CHECK_EQ(fx_store_freeze(&m.store, s, any(2)), dirty);
    memcpy(m.saved, m.now, SIZE);
    /* the store alone must give these bytes */
    uint64_t lo = any(BLOCKS) * B;
    static unsigned char block[B];
    size_t n = fx_store_pieces(&m.store, lo, lo + B, m.pieces);
    memset(block, 0, B);
    for (size_t i = 0; i < n; i++) {
        zb_piece p = m.pieces[i];
        if (p.fd >= 0) CHECK_EQ(pread((int)p.fd, block + (p.start - lo), p.stop - p.start, p.offset), p.stop - p.start);
    }
    fx_check_same(block, m.saved + lo, B, lo);
}

static void model_discard(void)
{
    uint64_t f, l;
    CHECK_OK(zb_discard(s, &f, &l));
    fx_store_ended(&m.store, f, l);
    memcpy(m.now, m.saved, SIZE);
}

static void model_drop(void)
{
    uint64_t lo = any(SIZE), hi = lo + any(SIZE);
    CHECK_OK(zb_drop(s, lo, hi, any(4) ? 0 : ZB_DROP_HOLES));
}

static void model_second_window(void)
{
    if (m.windows[1]) zb_window_free(m.windows[1]);
    m.starts[1] = any(BLOCKS) * B;
    m.lengths[1] = (1 + any(BLOCKS - m.starts[1] / B)) * B;
    m.windows[1] = fx_window(s, m.starts[1], m.lengths[1]);
}

static void model_step(void)
{
    uint64_t lo, hi;
    int k;
    switch (any(20)) {
    case 0: model_freeze(); break;
    case 1: any(2) ? model_drop() : model_discard(); break;
    case 2: model_drop(); break;
    case 3: any(3) ? model_drop() : model_second_window(); break;
    case 4: CHECK_OK(zb_release(m.windows[any(2)])); break;
    case 5: any(3) ? model_freeze() : zb_space_limit(s, any(3) ? SIZE : any(SIZE)); break;
    case 6:
    case 7:
    case 8: model_direct_write(); break;
    case 9:
    case 10:
    case 11:
        k = model_range(&lo, &hi);
        model_check(k, lo, hi);
        break;
    default: model_write();
    }
}

static void model(uint64_t seed, unsigned steps)
{
    printf("model: seed %llu, %u steps\n", (unsigned long long)seed, steps);
    fflush(stdout);
    m.random.state = seed;
    m.now = calloc(2, SIZE);
    CHECK(m.now);
    m.saved = m.now + SIZE;
    fx_store_open(&m.store, ID, SIZE / P);
    s = fx_space(ID);
    m.starts[0] = 0;
    m.lengths[0] = SIZE;
    m.windows[0] = fx_window(s, 0, SIZE);
    m.windows[1] = NULL;
    model_second_window();
    for (unsigned i = 0; i < steps; i++) {
        model_step();
        if (i % 64 == 0 || i + 1 == steps)
            for (int k = 0; k < 2; k++) model_check(k, m.starts[k], m.starts[k] + m.lengths[k]);
    }
    model_discard();
    zb_window_free(m.windows[0]);
    zb_window_free(m.windows[1]);
    zb_space_free(s);
    fx_store_close(&m.store);
    free(m.now);
}

int main(int argc, char **argv)
{
    fx_start(100);
    if (argc > 1 && strcmp(argv[1], "model") == 0) {
        unsigned steps = argc > 3 ? (unsigned)atoi(argv[3]) : FX_TSAN ? 200 : 2000;
        for (uint64_t seed = 1; argc < 3 && seed <= 5; seed++) model(seed, steps);
        if (argc >= 3) model(strtoull(argv[2], NULL, 0), steps);
        return 0;
    }
    RUN(on_a_hole);
    RUN(on_clean_pages_keeps_the_old_bytes);
    RUN(blocks_of_file_and_hole);
    RUN(sequential_on_a_hole);
    RUN(sequential_on_clean_pages);
    RUN(sequential_streams);
    RUN(random_pages);
    RUN(the_limit);
    RUN(the_unit_widens_before_mappings_run_out);
    RUN(whole_blocks_are_counted);
    RUN(writes_show_in_every_window);
    RUN(a_window_made_after_writing);
    RUN(freeze_of_nothing);
    RUN(freeze_tells_where_the_bytes_lie);
    RUN(the_next_generation_has_a_new_file);
    RUN(runs_of_neighbours_are_joined);
    RUN(files_rotate);
    RUN(discarded_bytes_are_gone);
    RUN(the_scratch_directory_moves_between_generations);
    RUN(a_generation_goes_on_in_the_file_of_the_one_before);
    RUN(what_is_large_gets_a_file_of_its_own);
    RUN(a_file_that_was_to_be_resumed_and_is_gone);
    RUN(a_resumed_file_is_discarded_with_its_generation);
    RUN(direct_write_without_source);
    RUN(direct_write_with_source);
    RUN(direct_write_of_absent_blocks);
    RUN(drop_of_what_an_absent_block_shows);
    RUN(direct_write_of_dirty_pages);
    RUN(direct_write_wakes_who_waits_for_a_fill);
    RUN(a_generation_that_is_said_to_have_failed);
    RUN(direct_write_from_an_absent_view);
    RUN(direct_write_when_closed);
    return 0;
}
