//! One damaged file through the decoder: what the mutation fuzzer and the libFuzzer target share.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use _rust::decode::{Crop, Options, Scratch, decode};
use _rust::error::Result;
use _rust::filter::Filter;
use _rust::geometry::{ResizeMode, Target};
use _rust::picture::set_libjpeg_only;
use _rust::view::ViewRange;

const MAX_PIXELS: u64 = 40_000_000;

/// SplitMix64.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }
}

fn target(random: &mut Random) -> Target {
    let mode = [ResizeMode::Squash, ResizeMode::Shortest, ResizeMode::Longest][random.below(3)];
    let filter = [Filter::Bicubic, Filter::Bilinear][random.below(2)];
    Target { height: 1 + random.below(80), width: 1 + random.below(80), mode, filter, fill: 9 }
}

fn crop(random: &mut Random) -> Crop {
    let flip = random.below(2) == 0;
    match random.below(3) {
        0 => Crop::Whole { flip },
        1 => {
            let mut side = |from: usize| (from + random.below(70)) as i64;
            let (left, top) = (side(0), side(0));
            Crop::Box { sides: [left, top, left + 1 + side(0), top + 1 + side(0)], flip }
        }
        _ => Crop::View {
            range: ViewRange { scale: (0.08, 1.0), ratio: (0.75, 1.34), flip: 0.5 },
            seed: 1,
            key: random.next(),
            view: 0,
        },
    }
}

/// Decodes a file in a way that `random` chooses, a JPEG by both paths, which must agree; whether
/// it could be decoded.
pub fn check(data: &[u8], random: &mut Random, slowest: Duration, scratch: &mut Scratch) -> bool {
    let targets: Vec<Target> = (0..=random.below(2)).map(|_| target(random)).collect();
    let options = Options {
        targets: &targets,
        orient: random.below(2) == 0,
        max_pixels: MAX_PIXELS,
        scaled: random.below(4) == 0,
        truncated: random.below(4) == 0,
    };
    let crop = crop(random);
    let result = run(data, &options, &crop, slowest, scratch);
    if data.starts_with(&[0xff, 0xd8]) {
        set_libjpeg_only(true);
        let libjpeg = run(data, &options, &crop, slowest, scratch);
        set_libjpeg_only(false);
        if result != libjpeg {
            fail(data, "the paths differ");
        }
    }
    result.is_ok()
}

/// The time that this thread has run, where the system tells it: other work on the machine does
/// not count. Elsewhere the time that has passed.
struct Clock(Option<Duration>, Instant);

impl Clock {
    fn start() -> Clock {
        Clock(Clock::ran(), Instant::now())
    }

    fn elapsed(&self) -> Duration {
        let ran = self.0.zip(Clock::ran()).map(|(start, end)| end - start);
        ran.unwrap_or_else(|| self.1.elapsed())
    }

    fn ran() -> Option<Duration> {
        let line = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
        let nanoseconds = line.split(' ').next()?.parse().ok()?;
        (nanoseconds > 0).then(|| Duration::from_nanos(nanoseconds))
    }
}

/// One decode, its outputs together.
fn run(
    data: &[u8],
    options: &Options,
    crop: &Crop,
    slowest: Duration,
    scratch: &mut Scratch,
) -> Result<Vec<u8>> {
    let mut outputs: Vec<Vec<u8>> = options.targets.iter().map(|t| vec![0; t.bytes()]).collect();
    let mut outs: Vec<&mut [u8]> = outputs.iter_mut().map(Vec::as_mut_slice).collect();
    let clock = Clock::start();
    let result = catch_unwind(AssertUnwindSafe(|| decode(data, options, crop, scratch, &mut outs)));
    let taken = clock.elapsed();
    let result = result.unwrap_or_else(|_| fail(data, "a panic"));
    if taken > slowest {
        fail(data, &format!("{taken:?}, {result:?}"));
    }
    result.map(|()| outputs.concat())
}

/// Keeps the file for the one who looks into it.
fn fail(data: &[u8], what: &str) -> ! {
    let path = std::env::temp_dir().join("promptkd-fuzz-failure");
    std::fs::write(&path, data).expect("the temporary folder is writable");
    panic!("{what}: see {}", path.display());
}
