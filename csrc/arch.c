/* SPDX-License-Identifier: MIT
 * arch.c - was a fault a read or a write? The one thing that only the processor knows. */
#include "internal.h"

#include <ucontext.h>

ZB_IN_HANDLER int zb_is_write(const void *ucontext)
{
    const ucontext_t *uc = ucontext;
#if defined(__x86_64__)
    return (uc->uc_mcontext.gregs[REG_ERR] & 2) != 0;
#elif defined(__aarch64__)
    /* The kernel appends records to the frame; ESR_EL1's bit 6 (WnR) says whether it was a write. */
    const unsigned char *p = uc->uc_mcontext.__reserved, *end = p + sizeof uc->uc_mcontext.__reserved;
    while (p + 8 <= end) {
        uint32_t magic, size;
        memcpy(&magic, p, 4);
        memcpy(&size, p + 4, 4);
        if (magic == 0 || size == 0) break;
        if (magic == 0x45535201) {
            uint64_t esr;
            memcpy(&esr, p + 8, 8);
            return (esr >> 6) & 1;
        }
        p += size;
    }
    return -1;
#else
    (void)uc;
    return -1;
#endif
}
