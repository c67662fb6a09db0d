// SPDX-License-Identifier: Apache-2.0
//! Spends CPU time in named functions, as `profiled shares` does: `shares MILLISECONDS`. It reads a
//! byte first, and prints the truth.
use std::hint::black_box;
use std::io::Read;

#[repr(C)]
struct Timespec {
    seconds: i64,
    nanoseconds: i64,
}

extern "C" {
    fn clock_gettime(clock: i32, time: *mut Timespec) -> i32;
}

const CLOCK_THREAD_CPUTIME_ID: i32 = 3;

fn cpu_ns() -> i64 {
    let mut now = Timespec { seconds: 0, nanoseconds: 0 };
    unsafe { clock_gettime(CLOCK_THREAD_CPUTIME_ID, &mut now) };
    now.seconds * 1_000_000_000 + now.nanoseconds
}

macro_rules! spender {
    ($name:ident, $seed:literal) => {
        #[inline(never)]
        fn $name(ns: i64) -> i64 {
            let began = cpu_ns();
            loop {
                let mut x: u64 = $seed;
                for _ in 0..60_000 {
                    x ^= x << 13;
                    x ^= x >> 7;
                    x = black_box(x);
                }
                let spent = cpu_ns() - began;
                if spent >= ns {
                    return spent;
                }
            }
        }
    };
}

spender!(spend_most, 88172645463325252);
spender!(spend_some, 88172645463325253);
spender!(spend_little, 88172645463325254);

trait Level {
    fn descend(&self, spent: &mut [i64; 3], left_ms: i64) -> usize;
}

struct Upper(Box<dyn Level>, String);
struct Lowest;

impl Level for Upper {
    #[inline(never)]
    fn descend(&self, spent: &mut [i64; 3], left_ms: i64) -> usize {
        let text = self.1.clone();
        self.0.descend(spent, left_ms) + black_box(text).len()
    }
}

impl Level for Lowest {
    #[inline(never)]
    fn descend(&self, spent: &mut [i64; 3], left_ms: i64) -> usize {
        for _ in 0..left_ms / 10 {
            spent[0] += spend_most(7_000_000);
            spent[1] += spend_some(2_000_000);
            spent[2] += spend_little(1_000_000);
        }
        0
    }
}

fn main() {
    let milliseconds = std::env::args().nth(1).and_then(|it| it.parse().ok()).unwrap_or(0);
    std::io::stdin().read_exact(&mut [0]).expect("a byte");
    let mut levels: Box<dyn Level> = Box::new(Lowest);
    for number in 0..8 {
        levels = Box::new(Upper(levels, number.to_string()));
    }
    let mut spent = [0; 3];
    levels.descend(&mut spent, milliseconds);
    println!("spend_most {}\nspend_some {}\nspend_little {}", spent[0], spent[1], spent[2]);
}
