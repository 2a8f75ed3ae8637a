//! A bounded mutation fuzzer: damaged files of every format through every operation. Whatever
//! the bytes, there is a picture or a typed error, in bounded time and memory, and both JPEG
//! paths agree. `PROMPTKD_FUZZ_FILES` sets the number of files, `PROMPTKD_FUZZ_SEED` the first.

mod case;

use std::path::{Path, PathBuf};
use std::time::Duration;

use _rust::decode::Scratch;
use case::Random;

const SLOWEST: Duration = Duration::from_secs(2);
const MEMORY_KIB: u64 = 1 << 20;

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
    let mut decoded = 0;
    for i in seed..seed + files {
        let mut random = Random(i.wrapping_mul(0x2545_f491_4f6c_dd1d));
        let mut data = seeds[random.below(seeds.len())].1.clone();
        let other = &seeds[random.below(seeds.len())].1;
        mutate(&mut data, other, &mut random);
        decoded += u64::from(case::check(&data, &mut random, SLOWEST, &mut scratch));
    }
    println!("{files} files: {decoded} decoded, the rest refused");
    // Damage is not always fatal: both outcomes must occur, or the fuzzer is blind.
    assert!(decoded > files / 20 && decoded < files * 19 / 20);
    let peak = peak_memory().unwrap_or(0);
    assert!(peak < MEMORY_KIB, "{peak} KiB");
}
