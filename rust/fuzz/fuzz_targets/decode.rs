//! Any bytes through the decoder, guided by coverage.

#![no_main]

#[path = "../../tests/case/mod.rs"]
mod case;

use std::cell::RefCell;
use std::time::Duration;

use _rust::decode::Scratch;
use libfuzzer_sys::fuzz_target;

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

fuzz_target!(|data: &[u8]| {
    // The last bytes also choose what is made of the file, so that the fuzzer can try all of it.
    let tail = data.iter().rev().take(8).fold(0, |number, byte| number << 8 | u64::from(*byte));
    SCRATCH.with_borrow_mut(|scratch| {
        // libFuzzer itself watches the time.
        case::check(data, &mut case::Random(tail), Duration::MAX, scratch);
    });
});
