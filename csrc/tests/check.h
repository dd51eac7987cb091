/* SPDX-License-Identifier: MIT
 * check.h - what a test needs to say that something is not as it should be, and to never hang.
 *
 * A failed CHECK prints where, what and the values, and ends the program with status 1. The watchdog is a timer
 * that sends SIGKILL: a thread that sleeps in our handler has all other signals blocked, SIGALRM among them. */
#ifndef ZBIG_TESTS_CHECK_H
#define ZBIG_TESTS_CHECK_H

#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define SKIP 77 /* CTest's SKIP_RETURN_CODE */

__attribute__((format(printf, 3, 4), noreturn)) static inline void check_failed(const char *file, int line,
                                                                                const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    fflush(stdout);
    fprintf(stderr, "%s:%d: ", file, line);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    _exit(1);
}

#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) check_failed(__FILE__, __LINE__, "not true: %s", #condition);                                \
    } while (0)

/* For integers of any size; shown as signed, so that a negative errno is readable. */
#define CHECK_EQ(left, right)                                                                                          \
    do {                                                                                                               \
        long long l_ = (long long)(left), r_ = (long long)(right);                                                     \
        if (l_ != r_)                                                                                                  \
            check_failed(__FILE__, __LINE__, "%s == %lld (0x%llx), not %s == %lld (0x%llx)", #left, l_, l_, #right,    \
                         r_, r_);                                                                                      \
    } while (0)

/* left <= right, both unsigned */
#define CHECK_LE(left, right)                                                                                          \
    do {                                                                                                               \
        unsigned long long l_ = (left), r_ = (right);                                                                  \
        if (l_ > r_) check_failed(__FILE__, __LINE__, "%s == %llu > %s == %llu", #left, l_, #right, r_);               \
    } while (0)

#define CHECK_OK(call)                                                                                                 \
    do {                                                                                                               \
        int r_ = (call);                                                                                               \
        if (r_) check_failed(__FILE__, __LINE__, "%s returned %d (%s)", #call, r_, strerror(r_ < 0 ? -r_ : r_));       \
    } while (0)

/* For system calls that set errno. */
#define CHECK_SYS(call)                                                                                                \
    do {                                                                                                               \
        if ((call) < 0) check_failed(__FILE__, __LINE__, "%s: %m", #call);                                             \
    } while (0)

/* ZB_ONLY=name in the environment runs that test alone. */
static inline int wanted(const char *test)
{
    const char *only = getenv("ZB_ONLY");
    return !only || strcmp(only, test) == 0;
}

#define RUN(test)                                                                                                      \
    do {                                                                                                               \
        if (!wanted(#test)) break;                                                                                     \
        printf("%s\n", #test);                                                                                         \
        fflush(stdout);                                                                                                \
        test();                                                                                                        \
    } while (0)

static inline void watchdog(int seconds)
{
    timer_t timer;
    struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGKILL};
    struct itimerspec when = {.it_value.tv_sec = seconds};
    CHECK_SYS(timer_create(CLOCK_MONOTONIC, &event, &timer));
    CHECK_SYS(timer_settime(timer, 0, &when, NULL));
}

#endif
