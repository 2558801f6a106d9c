// SPDX-License-Identifier: Apache-2.0
/* WRAP: pread process_vm_readv aligned_alloc lseek */
/* The digest: what changes it, what does not, and that all ways to read give the same one. */
#include <inttypes.h>
#include <sys/uio.h>

#include "ram.h"
#include "test.h"

#define PAGE ((size_t)HU_PAGE_SIZE)
#define PAGES ((size_t)300)

WRAPPER(void *, NULL, aligned_alloc, (size_t alignment, size_t size), (alignment, size))
WRAPPER(off_t, -1, lseek, (int fd, off_t offset, int whence), (fd, offset, whence))

/* Reads that end early: the end of the file, or less than was asked for. */
static int end_after; /* so many calls, this one included; 0: never */
static bool short_reads;

static bool at_end(void)
{
	return end_after > 0 && --end_after == 0;
}

ssize_t __real_pread(int fd, void *buffer, size_t length, off_t offset);
ssize_t __wrap_pread(int fd, void *buffer, size_t length, off_t offset);
static struct injection inject_pread;

ssize_t __wrap_pread(int fd, void *buffer, size_t length, off_t offset)
{
	if (injected(&inject_pread))
		return -1;
	if (at_end())
		return 0;
	return __real_pread(fd, buffer, short_reads && length > 5000 ? 5000 : length, offset);
}

ssize_t __real_process_vm_readv(pid_t pid, const struct iovec *local, unsigned long local_count,
				const struct iovec *remote, unsigned long remote_count,
				unsigned long flags);
ssize_t __wrap_process_vm_readv(pid_t pid, const struct iovec *local, unsigned long local_count,
				const struct iovec *remote, unsigned long remote_count,
				unsigned long flags);
static struct injection inject_readv;
static bool readv_is_short;

ssize_t __wrap_process_vm_readv(pid_t pid, const struct iovec *local, unsigned long local_count,
				const struct iovec *remote, unsigned long remote_count,
				unsigned long flags)
{
	if (injected(&inject_readv))
		return -1;
	if (readv_is_short)
		return 4096;
	return __real_process_vm_readv(pid, local, local_count, remote, remote_count, flags);
}

static uint64_t next_random(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state;
}

static void fill(void *memory, size_t length, uint64_t seed)
{
	uint64_t *words = memory;

	for (size_t i = 0; i < length / sizeof(uint64_t); i++)
		words[i] = next_random(&seed);
}

static bool same(const struct hu_ram_digest *a, const struct hu_ram_digest *b)
{
	return a->low == b->low && a->high == b->high && a->pages == b->pages;
}

static struct hu_ram_digest digest_file(int fd, uint64_t offset, uint64_t length, uint64_t sample)
{
	struct hu_ram_digest digest;

	CHECK(hu_ram_digest_file(fd, offset, length, sample, &digest) == 0);
	return digest;
}

static struct hu_ram_digest digest_memory(const void *memory, uint64_t length, uint64_t sample)
{
	struct hu_ram_mapping mapping = { .start = (uintptr_t)memory, .length_bytes = length };
	struct hu_ram_digest digest;

	CHECK(hu_ram_digest_process(getpid(), &mapping, sample, &digest) == 0);
	return digest;
}

static void *map(int fd, size_t length, int flags)
{
	void *memory = mmap(NULL, length, PROT_READ | PROT_WRITE, flags, fd, 0);

	CHECK(memory != MAP_FAILED);
	CHECK(madvise(memory, length, MADV_NOHUGEPAGE) == 0);
	return memory;
}

static int make_file(size_t length)
{
	int fd = memfd_create("digest", MFD_CLOEXEC);

	CHECK(fd >= 0 && ftruncate(fd, (off_t)length) == 0);
	return fd;
}

/* ---- the hash of a page ---- */

static void test_key(void)
{
	uint64_t key[HU_KEY_WORDS];

	hu_page_key(key);
	for (size_t i = 0; i < HU_PAGE_WORDS; i++) {
		uint64_t difference = key[i] ^ key[i + HU_KEY_SHIFT];

		CHECK((uint32_t)difference != 0 && difference >> 32 != 0);
	}
}

static void test_hashers_agree(void)
{
	uint64_t key[HU_KEY_WORDS], page[HU_PAGE_WORDS];
	hu_page_hasher best = hu_page_hasher_best();

	hu_page_key(key);
	for (uint64_t seed = 0; seed < 200; seed++) {
		memset(page, seed % 2 ? 0xff : 0, sizeof(page));
		if (seed > 1)
			fill(page, sizeof(page), seed);

		struct hu_page_hash a = hu_page_hash_generic(key, page), b = best(key, page);

		CHECK(a.low == b.low && a.high == b.high);
	}
}

/* Also where one of the two hashes is blind: the partner plus its key is 0 modulo 2^32. */
static void test_each_bit_counts(void)
{
	uint64_t key[HU_KEY_WORDS], page[HU_PAGE_WORDS];
	hu_page_hasher hasher = hu_page_hasher_best();

	hu_page_key(key);
	for (size_t kind = 0; kind < 4; kind++) {
		memset(page, 0, sizeof(page));
		if (kind == 1)
			fill(page, sizeof(page), 7);
		for (size_t i = 0; kind >= 2 && i < HU_PAGE_WORDS; i++) {
			uint64_t k = key[kind == 2 ? i : i + HU_KEY_SHIFT];

			page[i] = (uint64_t)(0 - (uint32_t)(k >> 32)) << 32 |
				  (uint32_t)(0 - (uint32_t)k);
		}

		struct hu_page_hash before = hasher(key, page);

		for (size_t bit = 0; bit < PAGE * 8; bit++) {
			page[bit / 64] ^= 1ULL << bit % 64;

			struct hu_page_hash after = hasher(key, page);

			CHECK(after.low != before.low || after.high != before.high);
			page[bit / 64] ^= 1ULL << bit % 64;
		}
	}
}

/* ---- the digest ---- */

/* It may be compared across versions of hostupdate: these numbers never change. */
static void test_golden(void)
{
	cleanup_close int fd = make_file(PAGES * PAGE);
	uint64_t *memory = map(fd, PAGES * PAGE, MAP_SHARED);

	for (size_t i = 0; i < PAGES * HU_PAGE_WORDS; i += 3)
		memory[i] = i * i;

	struct hu_ram_digest all = digest_file(fd, 0, PAGES * PAGE, 0);
	struct hu_ram_digest some = digest_file(fd, 0, PAGES * PAGE, 10);

	CHECK(same(&all, &(struct hu_ram_digest){ 0x958dc4205650b776, 0xe0d44f8909131957, 300 }));
	CHECK(same(&some, &(struct hu_ram_digest){ 0x25019a4a14d00b0f, 0xbb787968d4eebcf6, 10 }));
	(void)munmap(memory, PAGES * PAGE);
}

static void test_changes(void)
{
	cleanup_close int fd = make_file(PAGES * PAGE);
	uint8_t *memory = map(fd, PAGES * PAGE, MAP_SHARED);
	uint8_t page[PAGE];

	fill(memory, PAGES * PAGE, 1);

	struct hu_ram_digest before = digest_file(fd, 0, PAGES * PAGE, 0), after;

	CHECK(before.pages == PAGES);
	for (size_t i = 0; i < PAGES * PAGE; i += 3511) {
		memory[i] ^= (uint8_t)(1 << i % 8);
		after = digest_file(fd, 0, PAGES * PAGE, 0);
		CHECK(after.low != before.low && after.high != before.high);
		memory[i] ^= (uint8_t)(1 << i % 8);
	}

	/* Two pages change places. */
	memcpy(page, memory, PAGE);
	memcpy(memory, memory + 9 * PAGE, PAGE);
	memcpy(memory + 9 * PAGE, page, PAGE);
	after = digest_file(fd, 0, PAGES * PAGE, 0);
	CHECK(after.low != before.low && after.high != before.high);
	memcpy(memory + 9 * PAGE, memory, PAGE);
	memcpy(memory, page, PAGE);
	after = digest_file(fd, 0, PAGES * PAGE, 0);
	CHECK(same(&after, &before));

	/* Equal pages do not cancel each other, wherever they are. */
	memset(memory, 0, PAGES * PAGE);
	memset(memory + PAGE, 1, 2 * PAGE);
	before = digest_file(fd, 0, PAGES * PAGE, 0);
	CHECK(before.pages == 2 && before.low && before.high);
	(void)munmap(memory, PAGES * PAGE);
}

static void test_holes(void)
{
	cleanup_close int fd = make_file(PAGES * PAGE);
	struct hu_ram_digest empty = digest_file(fd, 0, PAGES * PAGE, 0);
	uint8_t *memory = map(fd, PAGES * PAGE, MAP_SHARED);
	struct stat st;

	CHECK(same(&empty, &(struct hu_ram_digest){ 0 }));
	memory[70 * PAGE + 5] = 1;
	memory[200 * PAGE] = 1;

	struct hu_ram_digest holes = digest_file(fd, 0, PAGES * PAGE, 0);

	CHECK(holes.pages == 2);
	CHECK(fstat(fd, &st) == 0);
	CHECK(st.st_blocks == 2 * 8);

	for (size_t i = 0; i < PAGES; i++)
		memory[i * PAGE + 77] = 0; /* makes a page */

	struct hu_ram_digest zeros = digest_file(fd, 0, PAGES * PAGE, 0);

	CHECK(same(&zeros, &holes));
	(void)munmap(memory, PAGES * PAGE);
}

static void test_ranges(void)
{
	cleanup_close int fd = make_file(PAGES * PAGE);
	uint8_t *memory = map(fd, PAGES * PAGE, MAP_SHARED);

	/* The same content at two places of the file. */
	fill(memory, 100 * PAGE, 3);
	memcpy(memory + 150 * PAGE, memory, 100 * PAGE);

	struct hu_ram_digest first = digest_file(fd, 0, 100 * PAGE, 0);
	struct hu_ram_digest second = digest_file(fd, 150 * PAGE, 100 * PAGE, 0);

	CHECK(first.pages == 100 && same(&first, &second));

	/* Part of a page, and what is behind the end of the file: as if there were zeros. */
	second = digest_file(fd, 150 * PAGE, 99 * PAGE + 10, 0);
	CHECK(second.pages == 100 && !same(&first, &second));
	memset(memory + 249 * PAGE + 10, 0, PAGE - 10);
	first = digest_file(fd, 150 * PAGE, 100 * PAGE, 0);
	CHECK(same(&first, &second));
	CHECK(ftruncate(fd, 249 * PAGE + 10) == 0);
	first = digest_file(fd, 150 * PAGE, 1000 * PAGE, 0);
	CHECK(same(&first, &second));
	first = digest_file(fd, 240 * PAGE, 15 * PAGE, 0); /* short enough to be read at once */
	CHECK(first.pages == 10);
	first = digest_file(fd, 1000 * PAGE, 100 * PAGE, 0);
	CHECK(same(&first, &(struct hu_ram_digest){ 0 }));
	first = digest_file(fd, 0, 0, 0);
	CHECK(same(&first, &(struct hu_ram_digest){ 0 }));

	CHECK(hu_ram_digest_file(fd, 1, PAGE, 0, NULL) == -EINVAL);
	CHECK(hu_ram_digest_file(fd, 0, UINT64_MAX, 0, NULL) == -EINVAL);
	CHECK(hu_ram_digest_file(fd, UINT64_MAX - PAGE + 1, PAGE, 0, NULL) == -EINVAL);
	CHECK(hu_ram_digest_file(-1, 0, PAGE, 0, NULL) == -EBADF);
	(void)munmap(memory, PAGES * PAGE);
}

/* A file on disk, whose extents are told in other units. */
static void test_disk(void)
{
	cleanup_close int disk = open(".", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
	cleanup_close int fd = make_file(PAGES * PAGE);
	uint8_t data[3000];

	CHECK(disk >= 0 && ftruncate(disk, PAGES * PAGE) == 0);
	memset(data, 5, sizeof(data));
	for (size_t i = 0; i < PAGES; i += 37) {
		CHECK(pwrite(disk, data, sizeof(data), (off_t)(i * PAGE + 1200)) == 3000);
		CHECK(pwrite(fd, data, sizeof(data), (off_t)(i * PAGE + 1200)) == 3000);
	}
	struct hu_ram_digest a = digest_file(disk, 0, PAGES * PAGE, 0);
	struct hu_ram_digest b = digest_file(fd, 0, PAGES * PAGE, 0);

	CHECK(same(&a, &b) && a.pages >= 9);
}

static void test_sample_pages(void)
{
	static const uint64_t sizes[] = { 1, 2, 7, 300, 262144, 1ULL << 40 };

	for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
		uint64_t pages = sizes[i], count = pages < 300 ? pages : 299, sum = 0;

		for (uint64_t k = 0; k < count; k++) {
			uint64_t page = hu_sample_page(k, count, pages);
			double low = (double)k / (double)count * (double)pages;

			CHECK(page < pages);
			CHECK(k == 0 || page > hu_sample_page(k - 1, count, pages));
			CHECK((double)page > low - (double)pages / (double)count - 1);
			CHECK((double)page < low + 2 * (double)pages / (double)count + 1);
			sum += page / count;
		}
		if (pages > 1000) /* the mean place is the middle, give or take */
			CHECK(sum > pages / 100 * 45 && sum < pages / 100 * 55);
	}
}

static void test_sampled(void)
{
	cleanup_close int fd = make_file(PAGES * PAGE);
	uint8_t *memory = map(fd, PAGES * PAGE, MAP_SHARED);

	fill(memory, PAGES * PAGE, 11);

	struct hu_ram_digest all = digest_file(fd, 0, PAGES * PAGE, 0);
	struct hu_ram_digest more = digest_file(fd, 0, PAGES * PAGE, PAGES);
	struct hu_ram_digest some = digest_file(fd, 0, PAGES * PAGE, 30);
	struct hu_ram_digest again = digest_file(fd, 0, PAGES * PAGE, 30);

	CHECK(same(&all, &more));
	CHECK(some.pages == 30 && same(&some, &again) && !same(&some, &all));

	/* Exactly the pages of the sample count. */
	bool sampled[PAGES] = { false };

	for (uint64_t i = 0; i < 30; i++)
		sampled[hu_sample_page(i, 30, PAGES)] = true;
	for (size_t i = 0; i < PAGES; i++) {
		memory[i * PAGE + 99] ^= 4;
		again = digest_file(fd, 0, PAGES * PAGE, 30);
		CHECK(same(&some, &again) != sampled[i]);
		memory[i * PAGE + 99] ^= 4;
	}
	(void)munmap(memory, PAGES * PAGE);
}

/* ---- by the process ---- */

static void test_process_as_file(void)
{
	cleanup_close int fd = make_file(PAGES * PAGE);
	uint8_t *shared = map(fd, PAGES * PAGE, MAP_SHARED);
	uint8_t *memory = map(-1, PAGES * PAGE, MAP_PRIVATE | MAP_ANONYMOUS);

	/* All ways in which pages may lie: lone ones, stretches longer than a chunk, holes. */
	for (size_t i = 0; i < PAGES; i++) {
		if (i % 7 == 3 || (i > 100 && i < 180))
			fill(shared + i * PAGE, PAGE, i + 1);
	}
	for (size_t i = 0; i < PAGES; i++) {
		if (memcmp(shared + i * PAGE, (uint8_t[PAGE]){ 0 }, PAGE) != 0)
			memcpy(memory + i * PAGE, shared + i * PAGE, PAGE);
	}
	for (uint64_t sample = 0; sample < PAGES; sample += 59) {
		struct hu_ram_digest a = digest_file(fd, 0, PAGES * PAGE, sample);
		struct hu_ram_digest b = digest_memory(memory, PAGES * PAGE, sample);

		CHECK(same(&a, &b));
	}

	/* Untouched pages stay untouched. */
	uint8_t *untouched = map(-1, PAGES * PAGE, MAP_PRIVATE | MAP_ANONYMOUS);
	unsigned char resident[PAGES];
	struct hu_ram_digest digest = digest_memory(untouched, PAGES * PAGE, 0);

	CHECK(same(&digest, &(struct hu_ram_digest){ 0 }));
	CHECK(mincore(untouched, PAGES * PAGE, resident) == 0);
	CHECK(!memchr(resident, 1, sizeof(resident)));

	/* Gone from under us. */
	CHECK(munmap(untouched + 100 * PAGE, PAGE) == 0);
	digest = digest_memory(untouched, PAGES * PAGE, 0);
	CHECK(digest.pages == 0);
	(void)munmap(untouched, PAGES * PAGE);
	(void)munmap(memory, PAGES * PAGE);
	(void)munmap(shared, PAGES * PAGE);
}

/* Private memory over a file, as share=off makes it. */
static void test_private_file(void)
{
	cleanup_close int fd = make_file(PAGES * PAGE);
	cleanup_close int copy = make_file(PAGES * PAGE);
	struct stat before, after;
	uint8_t *other = map(copy, PAGES * PAGE, MAP_SHARED);

	for (size_t i = 0; i < PAGES; i += 5)
		CHECK(pwrite(fd, &i, sizeof(i), (off_t)(i * PAGE + 8)) == sizeof(i));

	uint8_t *memory = map(fd, PAGES * PAGE, MAP_PRIVATE);

	for (size_t i = 0; i < 60; i++)
		memory[i * PAGE + 3] = 'p';
	for (size_t i = 0; i < PAGES; i += 5)
		memcpy(other + i * PAGE + 8, &i, sizeof(i));
	for (size_t i = 0; i < 60; i++)
		other[i * PAGE + 3] = 'p';
	CHECK(fstat(fd, &before) == 0);

	struct hu_ram_mapping mapping = { .start = (uintptr_t)memory,
					  .length_bytes = PAGES * PAGE,
					  .inode = before.st_ino };

	for (uint64_t sample = 0; sample < PAGES; sample += 59) {
		struct hu_ram_digest a = digest_file(copy, 0, PAGES * PAGE, sample), b;

		CHECK(hu_ram_digest_process(getpid(), &mapping, sample, &b) == 0);
		CHECK(same(&a, &b));
	}
	CHECK(fstat(fd, &after) == 0);
	CHECK(after.st_blocks == before.st_blocks);
	(void)munmap(memory, PAGES * PAGE);
	(void)munmap(other, PAGES * PAGE);
}

/* ---- failures ---- */

static void test_failures(void)
{
	cleanup_close int fd = make_file(PAGES * PAGE);
	uint8_t *shared = map(fd, PAGES * PAGE, MAP_SHARED);
	uint8_t *memory = map(-1, PAGES * PAGE, MAP_PRIVATE | MAP_ANONYMOUS);
	struct hu_ram_mapping mapping = { .start = (uintptr_t)memory,
					  .length_bytes = PAGES * PAGE };
	struct hu_ram_digest untouched = { .low = 42 };

	fill(shared, PAGES * PAGE, 5);
	memcpy(memory, shared, PAGES * PAGE);

	struct hu_ram_digest all = digest_file(fd, 0, PAGES * PAGE, 0), digest;

	INJECT(aligned_alloc, ENOMEM, 0);
	CHECK(hu_ram_digest_file(fd, 0, PAGES * PAGE, 0, &untouched) == -ENOMEM);
	INJECT(aligned_alloc, ENOMEM, 0);
	CHECK(hu_ram_digest_process(getpid(), &mapping, 0, &untouched) == -ENOMEM);
	INJECT(lseek, EIO, 0);
	CHECK(hu_ram_digest_file(fd, 0, PAGES * PAGE, 0, &untouched) == -EIO);
	INJECT(lseek, EIO, 1);
	CHECK(hu_ram_digest_file(fd, 0, PAGES * PAGE, 0, &untouched) == -EIO);
	INJECT(pread, EIO, 1);
	CHECK(hu_ram_digest_file(fd, 0, PAGES * PAGE, 0, &untouched) == -EIO);
	INJECT(pread, EIO, 0);
	CHECK(hu_ram_digest_process(getpid(), &mapping, 0, &untouched) == -EIO);
	end_after = 1;
	CHECK(hu_ram_digest_process(getpid(), &mapping, 0, &untouched) == -ESRCH);
	INJECT(readv, ESRCH, 1);
	CHECK(hu_ram_digest_process(getpid(), &mapping, 0, &untouched) == -ESRCH);
	INJECT(readv, EPERM, 0);
	CHECK(hu_ram_digest_process(getpid(), &mapping, 0, &untouched) == -EACCES);
	readv_is_short = true;
	CHECK(hu_ram_digest_process(getpid(), &mapping, 0, &untouched) == -EFAULT);
	readv_is_short = false;
	CHECK(untouched.low == 42);

	INJECT(pread, EINTR, 0);
	CHECK(hu_ram_digest_file(fd, 0, PAGES * PAGE, 0, &digest) == 0 && same(&digest, &all));
	INJECT(readv, EINTR, 0);
	CHECK(hu_ram_digest_process(getpid(), &mapping, 0, &digest) == 0 && same(&digest, &all));
	short_reads = true;
	CHECK(hu_ram_digest_file(fd, 0, PAGES * PAGE, 0, &digest) == 0 && same(&digest, &all));
	CHECK(hu_ram_digest_process(getpid(), &mapping, 0, &digest) == 0 && same(&digest, &all));
	short_reads = false;

	/* The file is cut short while it is read. */
	end_after = 3;
	CHECK(hu_ram_digest_file(fd, 0, PAGES * PAGE, 0, &digest) == 0);
	CHECK(digest.pages < PAGES);
	(void)munmap(memory, PAGES * PAGE);
	(void)munmap(shared, PAGES * PAGE);
}

int main(void)
{
	test_key();
	test_hashers_agree();
	test_each_bit_counts();
	test_golden();
	test_changes();
	test_holes();
	test_ranges();
	test_disk();
	test_sample_pages();
	test_sampled();
	test_process_as_file();
	if (geteuid() == 0) /* opens map_files */
		test_private_file();
	test_failures();
	return 0;
}
