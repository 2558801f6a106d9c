// SPDX-License-Identifier: Apache-2.0
#include <fcntl.h>
#include <string.h>
#include <sys/uio.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "ram.h"

/*
 * The digest is the sum, over all pages that are not zero, of a mix of the page's hash and its
 * index. A sum needs no order, so holes may be skipped and pages read in any way.
 *
 * The hash of a page is NH (Black, Halevi, Krawczyk, Krovetz, Rogaway: "UMAC: Fast and Secure
 * Message Authentication", 1999), twice: the words of the page, 32 bits each, are added to those
 * of a key, multiplied in pairs, and the 64 bit products summed. The second time the key is shifted
 * by some words. It is four vector operations for each 32 bytes and hash, so memory is the limit.
 * For changes that do not depend on the key two pages collide with a probability of 2^-64. The key
 * is no secret, so this protects from accidents, not from a forger. What is certain, not just
 * probable, is that a change within one word is seen: it changes a product unless its partner in
 * the pair plus the key's word is 0 modulo 2^32, and that cannot be so in both hashes, because the
 * two words of the key differ (the tests check that of all).
 *
 * The mix is four rounds of a Feistel network, a bijection of the hash for a given index: a change
 * of one page's hash always changes the sum. Pages that change places meet other indices.
 *
 * Zero pages are told by their hash; one look at the data is enough.
 */

#define CHUNK_PAGES 32 /* 128 KiB: stays in the second-level cache between reading and hashing */
#define PAGEMAP_ENTRIES 512

/* /proc/PID/pagemap, Documentation/admin-guide/mm/pagemap.rst */
#define PAGEMAP_PRESENT (1ULL << 63)
#define PAGEMAP_SWAPPED (1ULL << 62)

#define GOLDEN 0x9e3779b97f4a7c15ULL /* 2^64 divided by the golden ratio, odd */

/* A bijection that lets each bit in change each bit out: the finalizer of splitmix64. */
static uint64_t scramble(uint64_t x)
{
	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
	x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
	return x ^ (x >> 31);
}

void hu_page_key(uint64_t *ret_key)
{
	for (uint64_t i = 0; i < HU_KEY_WORDS; i++)
		ret_key[i] = scramble((i + 1) * GOLDEN);
}

static uint64_t multiply_pair(uint64_t key, uint64_t words)
{
	uint32_t low = (uint32_t)words + (uint32_t)key;
	uint32_t high = (uint32_t)(words >> 32) + (uint32_t)(key >> 32);

	return (uint64_t)low * high;
}

struct hu_page_hash hu_page_hash_generic(const uint64_t *key, const uint64_t *page)
{
	struct hu_page_hash hash = { 0 };

	for (size_t i = 0; i < HU_PAGE_WORDS; i++) {
		hash.low += multiply_pair(key[i], page[i]);
		hash.high += multiply_pair(key[i + HU_KEY_SHIFT], page[i]);
	}
	return hash;
}

#if defined(__x86_64__)

#define AVX2 __attribute__((target("avx2")))

AVX2 static inline __m256i load(const uint64_t *words)
{
	return _mm256_loadu_si256((const __m256i *)(const void *)words);
}

AVX2 static inline __m256i multiply_pairs(__m256i sum, __m256i key, __m256i words)
{
	__m256i pairs = _mm256_add_epi32(key, words);

	return _mm256_add_epi64(sum, _mm256_mul_epu32(pairs, _mm256_srli_epi64(pairs, 32)));
}

AVX2 static uint64_t add_lanes(__m256i sum)
{
	uint64_t lanes[4];

	_mm256_storeu_si256((__m256i *)(void *)lanes, sum);
	return lanes[0] + lanes[1] + lanes[2] + lanes[3];
}

AVX2 static struct hu_page_hash page_hash_avx2(const uint64_t *key, const uint64_t *page)
{
	__m256i low[2] = { _mm256_setzero_si256(), _mm256_setzero_si256() };
	__m256i high[2] = { _mm256_setzero_si256(), _mm256_setzero_si256() };

	/* Two sums each, so that one addition need not wait for the last. */
	for (size_t i = 0; i < HU_PAGE_WORDS; i += 8) {
		__m256i first = load(page + i), second = load(page + i + 4);
		__m256i middle = load(key + i + 4);

		low[0] = multiply_pairs(low[0], load(key + i), first);
		low[1] = multiply_pairs(low[1], middle, second);
		high[0] = multiply_pairs(high[0], middle, first);
		high[1] = multiply_pairs(high[1], load(key + i + 8), second);
	}
	return (struct hu_page_hash){
		.low = add_lanes(_mm256_add_epi64(low[0], low[1])),
		.high = add_lanes(_mm256_add_epi64(high[0], high[1])),
	};
}

_Static_assert(HU_KEY_SHIFT == 4, "page_hash_avx2 shifts the key by one vector");

#endif

hu_page_hasher hu_page_hasher_best(void)
{
#if defined(__x86_64__)
	if (__builtin_cpu_supports("avx2"))
		return page_hash_avx2;
#endif
	return hu_page_hash_generic;
}

struct digest {
	_Alignas(HU_PAGE_SIZE) uint8_t buffer[CHUNK_PAGES * HU_PAGE_SIZE];
	uint64_t pagemap[PAGEMAP_ENTRIES];
	uint64_t key[HU_KEY_WORDS];
	hu_page_hasher hasher;
	struct hu_page_hash zero;
	struct hu_ram_digest sum;

	uint64_t length_bytes;
	int fd; /* the file behind the range; -1: none */
	uint64_t offset_bytes;

	/* For a process: */
	int pagemap_fd;
	int32_t pid;
	uint64_t start;
	/* Pages of the process to be read in one call, at most as many as the buffer holds. */
	uint64_t batch[CHUNK_PAGES];
	struct iovec places[CHUNK_PAGES];
	size_t batch_count;
	size_t place_count;
};

static struct digest *digest_new(uint64_t length_bytes)
{
	struct digest *d = aligned_alloc(_Alignof(struct digest), sizeof(*d));

	if (!d)
		return NULL;
	memset(d->buffer, 0, HU_PAGE_SIZE);
	hu_page_key(d->key);
	d->hasher = hu_page_hasher_best();
	d->zero = d->hasher(d->key, (const uint64_t *)(const void *)d->buffer);
	d->sum = (struct hu_ram_digest){ 0 };
	d->length_bytes = length_bytes;
	d->fd = d->pagemap_fd = -1;
	d->batch_count = d->place_count = 0;
	return d;
}

static void add_page(struct digest *d, uint64_t index, const uint8_t *page)
{
	struct hu_page_hash h = d->hasher(d->key, (const uint64_t *)(const void *)page);

	if (h.low == d->zero.low && h.high == d->zero.high)
		return;

	h.low += scramble(h.high ^ scramble(index + GOLDEN));
	h.high += scramble(h.low);
	h.low += scramble(h.high + GOLDEN);
	h.high += scramble(h.low + 2 * GOLDEN);
	d->sum.low += h.low;
	d->sum.high += h.high;
	d->sum.pages++;
}

/* The bytes of the range from page `first` on, `count` pages at most. */
static uint64_t range_bytes(const struct digest *d, uint64_t first, uint64_t count)
{
	uint64_t left = d->length_bytes - first * HU_PAGE_SIZE;

	return left / HU_PAGE_SIZE < count ? left : count * HU_PAGE_SIZE;
}

/*
 * Adds length bytes of the file, at most a chunk, from page `first` on. They are read, not mapped:
 * page tables cost about as much as the copy, and a file cut short under us then ends the data and
 * not this process (SIGBUS).
 */
static int add_file_chunk(struct digest *d, uint64_t first, uint64_t length)
{
	uint64_t offset = d->offset_bytes + first * HU_PAGE_SIZE;
	uint64_t done = 0;

	while (done < length) {
		ssize_t got = TEMP_FAILURE_RETRY(
			pread(d->fd, d->buffer + done, length - done, (off_t)(offset + done)));

		if (got < 0)
			return -errno;
		if (got == 0)
			break;
		done += (uint64_t)got;
	}

	uint64_t pages = (done + HU_PAGE_SIZE - 1) / HU_PAGE_SIZE;

	memset(d->buffer + done, 0, pages * HU_PAGE_SIZE - done);
	for (uint64_t i = 0; i < pages; i++)
		add_page(d, first + i, d->buffer + i * HU_PAGE_SIZE);
	return 0;
}

static int add_file(struct digest *d, uint64_t first, uint64_t count)
{
	uint64_t from = d->offset_bytes + first * HU_PAGE_SIZE;
	uint64_t end = from + range_bytes(d, first, count);
	uint64_t start, stop;
	int r;

	/* SEEK_HOLE walks to the end of the data, however far; a few pages are not worth it. */
	if (count <= CHUNK_PAGES)
		return add_file_chunk(d, first, end - from);

	while ((r = hu_extent_next(d->fd, from, end, &start, &stop)) > 0) {
		/* Whole pages, where a file system's blocks are smaller. */
		start -= start % HU_PAGE_SIZE;
		stop += (HU_PAGE_SIZE - stop % HU_PAGE_SIZE) % HU_PAGE_SIZE;
		from = stop;
		if (stop > end)
			stop = end;

		while (start < stop) {
			uint64_t length = stop - start;

			if (length > sizeof(d->buffer))
				length = sizeof(d->buffer);
			r = add_file_chunk(d, (start - d->offset_bytes) / HU_PAGE_SIZE, length);
			if (r < 0)
				return r;
			start += length;
		}
	}
	return r;
}

/* Reads the pages that were collected and adds them. */
static int add_batch(struct digest *d)
{
	struct iovec here = { .iov_base = d->buffer, .iov_len = 0 };
	ssize_t got;

	if (d->batch_count == 0)
		return 0;
	for (size_t i = 0; i < d->place_count; i++)
		here.iov_len += d->places[i].iov_len;

	got = TEMP_FAILURE_RETRY(process_vm_readv(d->pid, &here, 1, d->places, d->place_count, 0));
	if (got < 0)
		return errno == EPERM ? -EACCES : -errno;
	if ((size_t)got != here.iov_len)
		return -EFAULT; /* part of it is not mapped any more */

	/* The end of the range may be within its last page. */
	memset(d->buffer + got, 0, d->batch_count * HU_PAGE_SIZE - (size_t)got);
	for (size_t i = 0; i < d->batch_count; i++)
		add_page(d, d->batch[i], d->buffer + i * HU_PAGE_SIZE);
	d->batch_count = d->place_count = 0;
	return 0;
}

static int collect_page(struct digest *d, uint64_t index)
{
	uintptr_t address = (uintptr_t)(d->start + index * HU_PAGE_SIZE);
	size_t length = (size_t)range_bytes(d, index, 1);
	struct iovec *last = d->place_count ? &d->places[d->place_count - 1] : NULL;

	if (last && (uintptr_t)last->iov_base + last->iov_len == address)
		last->iov_len += length;
	else
		d->places[d->place_count++] =
			(struct iovec){ .iov_base = (void *)address, .iov_len = length };
	d->batch[d->batch_count++] = index;
	return d->batch_count == CHUNK_PAGES ? add_batch(d) : 0;
}

static bool is_own(uint64_t pagemap_entry)
{
	return pagemap_entry & (PAGEMAP_PRESENT | PAGEMAP_SWAPPED);
}

/*
 * Private memory: what the process has of its own is read from it, the rest is in the file behind
 * it, or a hole. Neither reading makes pages in the guest.
 */
static int add_private(struct digest *d, uint64_t first, uint64_t count)
{
	int r = 0;

	while (r == 0 && count > 0) {
		uint64_t entries = count < PAGEMAP_ENTRIES ? count : PAGEMAP_ENTRIES;
		uint64_t place = d->start / HU_PAGE_SIZE + first;
		ssize_t got = TEMP_FAILURE_RETRY(pread(d->pagemap_fd, d->pagemap,
						       entries * sizeof(uint64_t),
						       (off_t)(place * sizeof(uint64_t))));

		if (got < 0)
			return -errno;
		if ((uint64_t)got < sizeof(uint64_t))
			return -ESRCH; /* no memory any more */
		entries = (uint64_t)got / sizeof(uint64_t);

		for (uint64_t i = 0; r == 0 && i < entries; i++) {
			uint64_t begin = i;

			if (is_own(d->pagemap[i])) {
				r = collect_page(d, first + i);
				continue;
			}
			while (i + 1 < entries && i + 1 - begin < CHUNK_PAGES &&
			       !is_own(d->pagemap[i + 1]))
				i++;
			if (d->fd >= 0)
				r = add_file(d, first + begin, i + 1 - begin);
		}
		first += entries;
		count -= entries;
	}
	return r;
}

uint64_t hu_sample_page(uint64_t index, uint64_t count, uint64_t pages)
{
	/* One page somewhere in each of `count` parts, the first of which are one page longer. */
	uint64_t size = pages / count, longer = pages % count;
	uint64_t start = index * size + (index < longer ? index : longer);

	return start + scramble(index + GOLDEN) % (size + (index < longer));
}

typedef int (*range_adder)(struct digest *d, uint64_t first, uint64_t count);

static int add_range(struct digest *d, uint64_t sample_pages, range_adder add)
{
	uint64_t pages = d->length_bytes / HU_PAGE_SIZE + (d->length_bytes % HU_PAGE_SIZE != 0);
	int r = 0;

	if (sample_pages == 0 || sample_pages >= pages)
		r = add(d, 0, pages);
	else
		for (uint64_t i = 0; r == 0 && i < sample_pages; i++)
			r = add(d, hu_sample_page(i, sample_pages, pages), 1);
	if (r == 0)
		r = add_batch(d);
	return r;
}

static bool range_is_good(uint64_t start, uint64_t length_bytes)
{
	uint64_t end;

	return start % HU_PAGE_SIZE == 0 && !__builtin_add_overflow(start, length_bytes, &end) &&
	       end <= INT64_MAX - HU_PAGE_SIZE;
}

int hu_ram_digest_file(int32_t fd, uint64_t offset_bytes, uint64_t length_bytes,
		       uint64_t sample_pages, struct hu_ram_digest *ret_digest)
{
	if (!range_is_good(offset_bytes, length_bytes))
		return -EINVAL;

	cleanup_free struct digest *d = digest_new(length_bytes);

	if (!d)
		return -ENOMEM;
	d->fd = fd;
	d->offset_bytes = offset_bytes;

	int r = add_range(d, sample_pages, add_file);

	if (r == 0)
		*ret_digest = d->sum;
	return r;
}

int hu_ram_digest_process(int32_t pid, const struct hu_ram_mapping *mapping, uint64_t sample_pages,
			  struct hu_ram_digest *ret_digest)
{
	cleanup_close int fd = -1;
	cleanup_close int pagemap_fd = -1;

	if (!range_is_good(mapping->start, mapping->length_bytes) ||
	    !range_is_good(mapping->offset_bytes, mapping->length_bytes))
		return -EINVAL;
	if (mapping->inode != 0) {
		fd = hu_ram_open_file(pid, mapping, O_RDONLY);
		if (fd < 0)
			return fd;
	}
	/*
	 * Shared memory is its file, all of it. The page tables do not tell: pages that this QEMU
	 * has not touched since it adopted them are not there, nor are those swapped out.
	 */
	if (mapping->shared)
		return fd < 0 ? -EINVAL :
				hu_ram_digest_file(fd, mapping->offset_bytes, mapping->length_bytes,
						   sample_pages, ret_digest);

	if (sysconf(_SC_PAGESIZE) != HU_PAGE_SIZE) /* that of the page tables' entries */
		return -EOPNOTSUPP;
	pagemap_fd = hu_proc_open(pid, "pagemap", O_RDONLY);
	if (pagemap_fd < 0)
		return pagemap_fd;

	cleanup_free struct digest *d = digest_new(mapping->length_bytes);

	if (!d)
		return -ENOMEM;
	d->fd = fd;
	d->offset_bytes = mapping->offset_bytes;
	d->pagemap_fd = pagemap_fd;
	d->pid = pid;
	d->start = mapping->start;

	int r = add_range(d, sample_pages, add_private);

	if (r == 0)
		*ret_digest = d->sum;
	return r;
}
