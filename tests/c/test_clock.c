// SPDX-License-Identifier: Apache-2.0
/* WRAP: clock_gettime adjtimex */
#include <sys/timex.h>

#include "test.h"

static bool backwards; /* the reference is set back between each two readings */

int __real_clock_gettime(clockid_t clock, struct timespec *now);
int __wrap_clock_gettime(clockid_t clock, struct timespec *now);
static struct injection inject_clock_gettime;

int __wrap_clock_gettime(clockid_t clock, struct timespec *now)
{
	static time_t second = 1000000;

	if (injected(&inject_clock_gettime))
		return -1;
	if (!backwards)
		return __real_clock_gettime(clock, now);
	*now = (struct timespec){ .tv_sec = second-- };
	return 0;
}

static int status; /* what adjtimex says */

int __wrap_adjtimex(struct timex *state);
static struct injection inject_adjtimex;

int __wrap_adjtimex(struct timex *state)
{
	if (injected(&inject_adjtimex))
		return -1;
	CHECK_INT(state->modes, 0);
	state->status = status;
	return TIME_OK;
}

static void tells_whether_the_clock_is_synchronised(void)
{
	status = STA_PLL | STA_UNSYNC;
	CHECK_INT(hu_clock_synchronised(), 0);
	status = STA_PLL | STA_INS;
	CHECK_INT(hu_clock_synchronised(), 1);
	INJECT(adjtimex, EPERM, 0);
	CHECK_INT(hu_clock_synchronised(), -EPERM);
}

static void brackets_the_same_clock(void)
{
	struct hu_clock_reading reading;

	CHECK_INT(hu_clock_bracket(CLOCK_MONOTONIC, CLOCK_MONOTONIC, 32, &reading), 0);
	CHECK(reading.uncertainty_ns >= 0);
	int64_t off = reading.reading_ns - reading.reference_ns;

	CHECK(off <= reading.uncertainty_ns && -off <= reading.uncertainty_ns);
}

static void more_tries_are_no_worse(void)
{
	struct hu_clock_reading reading;
	int64_t best = INT64_MAX;

	for (int i = 0; i < 20; i++) {
		CHECK_INT(hu_clock_bracket(CLOCK_MONOTONIC, CLOCK_REALTIME, 64, &reading), 0);
		if (reading.uncertainty_ns < best)
			best = reading.uncertainty_ns;
	}
	CHECK(best < MS);
	CHECK(reading.reading_ns > 1500000000 * NS_PER_SECOND);
}

static void refuses_nonsense(void)
{
	struct hu_clock_reading reading = { .reference_ns = 7 };

	CHECK_INT(hu_clock_bracket(CLOCK_MONOTONIC, CLOCK_REALTIME, 0, &reading), -EINVAL);
	CHECK_INT(hu_clock_bracket(12345, CLOCK_REALTIME, 1, &reading), -EINVAL);
	CHECK_INT(hu_clock_bracket(CLOCK_MONOTONIC, 12345, 1, &reading), -EINVAL);
	CHECK_INT(reading.reference_ns, 7);
}

static void passes_errors_on(void)
{
	struct hu_clock_reading reading = { .reference_ns = 7 };

	for (int i = 0; i < 3; i++) {
		INJECT(clock_gettime, ENODEV, i);
		CHECK_INT(hu_clock_bracket(CLOCK_MONOTONIC, CLOCK_REALTIME, 1, &reading), -ENODEV);
	}
	CHECK_INT(reading.reference_ns, 7);
}

static void drops_tries_in_which_the_reference_went_back(void)
{
	struct hu_clock_reading reading = { .reference_ns = 7 };

	backwards = true;
	CHECK_INT(hu_clock_bracket(CLOCK_REALTIME, CLOCK_MONOTONIC, 5, &reading), -EAGAIN);
	backwards = false;
	CHECK_INT(reading.reference_ns, 7);
}

int main(void)
{
	drops_tries_in_which_the_reference_went_back();
	brackets_the_same_clock();
	more_tries_are_no_worse();
	refuses_nonsense();
	passes_errors_on();
	tells_whether_the_clock_is_synchronised();
	return 0;
}
