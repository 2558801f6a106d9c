// SPDX-License-Identifier: Apache-2.0
#include <sys/timex.h>

#include "internal.h"

static int read_clock(clockid_t clock, int64_t *ret_ns)
{
	struct timespec now;

	if (clock_gettime(clock, &now) < 0)
		return -errno;
	*ret_ns = (int64_t)now.tv_sec * NS_PER_SECOND + now.tv_nsec;
	return 0;
}

int hu_clock_bracket(int32_t reference_clock, int32_t clock, uint32_t tries,
		     struct hu_clock_reading *ret_reading)
{
	if (tries == 0)
		return -EINVAL;

	struct hu_clock_reading best = { .uncertainty_ns = INT64_MAX };
	for (uint32_t i = 0; i < tries; i++) {
		int64_t before = 0, reading = 0, after = 0;
		int r = read_clock(reference_clock, &before);

		if (r == 0)
			r = read_clock(clock, &reading);
		if (r == 0)
			r = read_clock(reference_clock, &after);
		if (r < 0)
			return r;

		/* A reference that can be set may have been set back: this try proves nothing. */
		if (after < before)
			continue;

		int64_t uncertainty = (after - before + 1) / 2; /* never rounded down */

		if (uncertainty < best.uncertainty_ns)
			best = (struct hu_clock_reading){
				.reference_ns = before + (after - before) / 2,
				.reading_ns = reading,
				.uncertainty_ns = uncertainty,
			};
	}

	if (best.uncertainty_ns == INT64_MAX)
		return -EAGAIN;
	*ret_reading = best;
	return 0;
}

int hu_clock_synchronised(void)
{
	struct timex state = { .modes = 0 }; /* only asks */

	if (adjtimex(&state) < 0)
		return -errno;
	return !(state.status & STA_UNSYNC);
}
