/* SPDX-License-Identifier: Apache-2.0 */
/* What ram.c and digest.c share, and what their tests look at. Nothing here is for Python. */
#ifndef HOSTUPDATE_RAM_H
#define HOSTUPDATE_RAM_H

#include "internal.h"

/* Opens /proc/PID/file. -ESRCH: no such process; -EACCES: not ours to look at. */
int hu_proc_open(int32_t pid, const char *file, int flags);

/*
 * Reads the text of a smaps file from fd. As hu_ram_mappings, but looks at nothing else: a file on
 * tmpfs is told as HU_RAM_FILE. -EBADMSG: this is not what the kernel writes.
 */
int hu_ram_parse(int fd, struct hu_ram_mapping *ret_mappings, size_t capacity);

/* As hu_ram_open, for private mappings too. flags: O_RDONLY or O_PATH. */
int hu_ram_open_file(int32_t pid, const struct hu_ram_mapping *mapping, int flags);

/*
 * The next stretch of a file that holds data, within [from, end). Returns 1, or 0 where only holes
 * follow. ret_stop may equal ret_start where the file changes under us; go on from there.
 */
int hu_extent_next(int fd, uint64_t from, uint64_t end, uint64_t *ret_start, uint64_t *ret_stop);

/* Pages of the digest, whatever the machine's. */
#define HU_PAGE_SIZE 4096
#define HU_PAGE_WORDS (HU_PAGE_SIZE / 8)
#define HU_KEY_SHIFT 4 /* words; see digest.c */
#define HU_KEY_WORDS (HU_PAGE_WORDS + HU_KEY_SHIFT)

struct hu_page_hash {
	uint64_t low;
	uint64_t high;
};

typedef struct hu_page_hash (*hu_page_hasher)(const uint64_t *key, const uint64_t *page);

void hu_page_key(uint64_t *ret_key);
struct hu_page_hash hu_page_hash_generic(const uint64_t *key, const uint64_t *page);

/* The quickest one that this processor runs; all give the same result. */
hu_page_hasher hu_page_hasher_best(void);

/* The index-th of `count` sampled pages out of `pages`; count <= pages. */
uint64_t hu_sample_page(uint64_t index, uint64_t count, uint64_t pages);

#endif
