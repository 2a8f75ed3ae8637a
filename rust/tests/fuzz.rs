//! A bounded mutation fuzzer: damaged files of every format through every operation. Whatever
//! the bytes, there is a picture or a typed error, in bounded time and memory, and both JPEG
//! paths agree. `PROMPTKD_FUZZ_FILES` sets the number of files, `PROMPTKD_FUZZ_SEED` the first.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use _rust::decode::{Crop, Options, Scratch, decode};
use _rust::error::Result;
use _rust::filter::Filter;
use _rust::geometry::{ResizeMode, Target};
use _rust::picture::set_libjpeg_only;
use _rust::view::ViewRange;

const MAX_PIXELS: u64 = 40_000_000;
const SLOWEST: Duration = Duration::from_secs(2);
const MEMORY_KIB: u64 = 1 << 20;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }
}

fn mutate(data: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    const EDGES: [u8; 8] = [0, 1, 0x7f, 0x80, 0xff, 0xd8, 0xd9, 0xda];
    for _ in 0..=random.below(5) {
        let at = random.below(data.len());
        let length = 1 + random.below(24);
        match random.below(8) {
            0 => data[at] = random.next() as u8,
            1 => data[at] ^= 1 << random.below(8),
            2 => data[at] = EDGES[random.below(8)],
            3 => drop(data.drain(at..(at + length).min(data.len()))),
            4 => data.truncate(at + 1),
            5 => {
                let copy = data[at..(at + length).min(data.len())].to_vec();
                let to = random.below(data.len());
                data.splice(to..to, copy);
            }
            6 => {
                let from = random.below(other.len());
                let piece = &other[from..(from + length).min(other.len())];
                let end = (at + piece.len()).min(data.len());
                data.splice(at..end, piece.iter().copied());
            }
            _ => {
                // Headers hold most of the decisions: strike there.
                let at = random.below(data.len().min(200));
                data[at] = random.next() as u8;
            }
        }
        if data.is_empty() {
            data.push(0);
        }
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

/// One decode, its outputs together.
fn run(data: &[u8], options: &Options, crop: &Crop, scratch: &mut Scratch) -> Result<Vec<u8>> {
    let mut outputs: Vec<Vec<u8>> = options.targets.iter().map(|t| vec![0; t.bytes()]).collect();
    let mut outs: Vec<&mut [u8]> = outputs.iter_mut().map(Vec::as_mut_slice).collect();
    let started = Instant::now();
    let result = catch_unwind(AssertUnwindSafe(|| decode(data, options, crop, scratch, &mut outs)));
    let taken = started.elapsed();
    let result = result.unwrap_or_else(|_| fail(data, "a panic"));
    if taken > SLOWEST {
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

fn seeds() -> Vec<(PathBuf, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    let entries = std::fs::read_dir(folder).expect("the corpus is in the repository");
    let mut seeds: Vec<_> = entries
        .map(|entry| entry.expect("readable").path())
        .map(|path| (path.clone(), std::fs::read(&path).expect("readable")))
        .collect();
    seeds.sort();
    assert!(seeds.len() >= 15);
    seeds
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |v| v.parse().expect("a number"))
}

/// The most memory this process has held, in KiB.
fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

#[test]
fn damaged_files_never_break_the_decoder() {
    let (files, seed) = (number("PROMPTKD_FUZZ_FILES", 3000), number("PROMPTKD_FUZZ_SEED", 0));
    let seeds = seeds();
    let mut scratch = Scratch::default();
    let (mut decoded, mut compared) = (0, 0);
    for i in seed..seed + files {
        let mut random = Random(i.wrapping_mul(0x2545_f491_4f6c_dd1d));
        let (path, original) = &seeds[random.below(seeds.len())];
        let mut data = original.clone();
        let other = &seeds[random.below(seeds.len())].1;
        mutate(&mut data, other, &mut random);
        let targets: Vec<Target> = (0..=random.below(2)).map(|_| target(&mut random)).collect();
        let options = Options {
            targets: &targets,
            orient: random.below(2) == 0,
            max_pixels: MAX_PIXELS,
            scaled: random.below(4) == 0,
        };
        let crop = crop(&mut random);
        let result = run(&data, &options, &crop, &mut scratch);
        decoded += u64::from(result.is_ok());
        if path.extension().is_some_and(|e| e == "jpg") {
            set_libjpeg_only(true);
            let libjpeg = run(&data, &options, &crop, &mut scratch);
            set_libjpeg_only(false);
            if result != libjpeg {
                fail(&data, &format!("the paths differ ({i}, {})", path.display()));
            }
            compared += 1;
        }
    }
    println!("{files} files: {decoded} decoded, the rest refused; {compared} by both paths");
    // Damage is not always fatal: both outcomes must occur, or the fuzzer is blind.
    assert!(decoded > files / 20 && decoded < files * 19 / 20);
    let peak = peak_memory().unwrap_or(0);
    assert!(peak < MEMORY_KIB, "{peak} KiB");
}
