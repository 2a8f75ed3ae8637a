//! Random views: a crop box and a flip, a pure function of (seed, image key, view number).
//!
//! The algorithm is torchvision's `RandomResizedCrop`: up to ten tries of an area uniform in
//! `scale` and a ratio log-uniform in `ratio`, then the largest centred box of an allowed ratio.
//! Draw n is `mix(state + (n + 1) * GOLDEN)` of SplitMix64, where `state` is
//! `mix(mix(mix(seed + GOLDEN) ^ key) ^ view)`; draw 0 decides the flip and draws 4t+1 to 4t+4
//! are try t's area, ratio, top and left. A draw's uniform number is its upper 53 bits over
//! 2^53; an integer below n is the upper half of the 128-bit product with n. Only additions,
//! multiplications, divisions and square roots are used, which IEEE 754 defines to the last
//! bit, so every machine draws the same boxes.

pub const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
const TRIES: u64 = 10;

/// Bounds of the random crop.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ViewRange {
    pub scale: (f64, f64),
    pub ratio: (f64, f64),
    pub flip: f64,
}

/// A box in pixels and whether it is mirrored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct View {
    pub left: u32,
    pub top: u32,
    pub width: u32,
    pub height: u32,
    pub flip: bool,
}

impl ViewRange {
    /// Says what is wrong with the bounds, if anything is.
    pub fn check(&self) -> Result<(), String> {
        let ordered = |(a, b): (f64, f64)| a > 0.0 && a <= b && b.is_finite();
        if !ordered(self.scale) || self.scale.1 > 1.0 {
            return Err(format!("scale must be 0 < low <= high <= 1, not {:?}", self.scale));
        }
        if !ordered(self.ratio) {
            return Err(format!("ratio must be 0 < low <= high, not {:?}", self.ratio));
        }
        if !(0.0..=1.0).contains(&self.flip) {
            return Err(format!("flip must lie in 0 to 1, not {}", self.flip));
        }
        Ok(())
    }
}

pub fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

struct Draws(u64);

impl Draws {
    fn new(seed: u64, key: u64, view: u32) -> Draws {
        Draws(mix(mix(mix(seed.wrapping_add(GOLDEN)) ^ key) ^ u64::from(view)))
    }

    fn bits(&self, n: u64) -> u64 {
        mix(self.0.wrapping_add((n + 1).wrapping_mul(GOLDEN)))
    }

    fn uniform(&self, n: u64) -> f64 {
        (self.bits(n) >> 11) as f64 / (1u64 << 53) as f64
    }

    fn between(&self, n: u64, (low, high): (f64, f64)) -> f64 {
        low + (high - low) * self.uniform(n)
    }

    fn below(&self, n: u64, bound: u32) -> u32 {
        ((u128::from(self.bits(n)) * u128::from(bound)) >> 64) as u32
    }
}

/// The view of a picture of `width` x `height` pixels.
pub fn random_view(
    range: &ViewRange,
    seed: u64,
    key: u64,
    view: u32,
    width: u32,
    height: u32,
) -> View {
    let draws = Draws::new(seed, key, view);
    let flip = draws.uniform(0) < range.flip;
    let area = f64::from(width) * f64::from(height);
    let logs = (log(range.ratio.0), log(range.ratio.1));
    for n in (0..TRIES).map(|t| 4 * t + 1) {
        let target = area * draws.between(n, range.scale);
        let ratio = exp(draws.between(n + 1, logs));
        let w = (target * ratio).sqrt().round_ties_even();
        let h = (target / ratio).sqrt().round_ties_even();
        if w >= 1.0 && h >= 1.0 && w <= f64::from(width) && h <= f64::from(height) {
            let (w, h) = (w as u32, h as u32);
            let top = draws.below(n + 2, height - h + 1);
            let left = draws.below(n + 3, width - w + 1);
            return View { left, top, width: w, height: h, flip };
        }
    }
    let (w, h) = central(range.ratio, width, height);
    View { left: (width - w) / 2, top: (height - h) / 2, width: w, height: h, flip }
}

/// The largest box whose ratio is allowed.
fn central((low, high): (f64, f64), width: u32, height: u32) -> (u32, u32) {
    let ratio = f64::from(width) / f64::from(height);
    let side = |x: f64, most: u32| (x.round_ties_even() as u32).clamp(1, most);
    if ratio < low {
        (width, side(f64::from(width) / low, height))
    } else if ratio > high {
        (side(f64::from(height) * high, width), height)
    } else {
        (width, height)
    }
}

/// The natural logarithm of a positive finite number, good to about 1e-15, the same everywhere.
fn log(x: f64) -> f64 {
    // x = m * 2^e with m in [1/sqrt 2, sqrt 2); log m = 2 atanh((m - 1) / (m + 1)).
    let (mut m, mut e) = (x, 0);
    while m >= std::f64::consts::SQRT_2 {
        m *= 0.5;
        e += 1;
    }
    while m < std::f64::consts::FRAC_1_SQRT_2 {
        m *= 2.0;
        e -= 1;
    }
    let t = (m - 1.0) / (m + 1.0);
    let square = t * t;
    let mut sum = 0.0;
    for k in (0..=13).rev() {
        sum = sum * square + 1.0 / f64::from(2 * k + 1);
    }
    2.0 * t * sum + f64::from(e) * std::f64::consts::LN_2
}

/// The exponential of a number of moderate size, good to about 1e-15, the same everywhere.
fn exp(x: f64) -> f64 {
    let turns = (x / std::f64::consts::LN_2).round_ties_even().clamp(-1000.0, 1000.0);
    let rest = x - turns * std::f64::consts::LN_2;
    let mut sum = 1.0;
    for k in (1..=18).rev() {
        sum = 1.0 + sum * rest / f64::from(k);
    }
    let factor = if turns < 0.0 { 0.5 } else { 2.0 };
    for _ in 0..turns.abs() as u32 {
        sum *= factor;
    }
    sum
}

/// The key of an image: the first eight bytes, little endian, of the BLAKE3 hash of its path
/// relative to the root, written with `/`.
pub fn image_key(path: &[u8]) -> u64 {
    let hash = blake3::hash(path);
    u64::from_le_bytes(hash.as_bytes()[..8].try_into().expect("a hash has 32 bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const RANGE: ViewRange = ViewRange { scale: (0.08, 1.0), ratio: (0.75, 4.0 / 3.0), flip: 0.5 };

    #[test]
    fn log_and_exp_are_close_to_the_true_ones() {
        for i in 1..4000 {
            let x = f64::from(i) * 0.01;
            assert!((log(x) - x.ln()).abs() <= 4e-15 * x.ln().abs().max(1.0), "log {x}");
            let y = x - 20.0;
            assert!((exp(y) / y.exp() - 1.0).abs() < 1e-14, "exp {y}");
        }
        assert_eq!((log(1.0), exp(0.0)), (0.0, 1.0));
    }

    #[test]
    fn boxes_lie_inside_and_cover_the_allowed_area() {
        let mut share = 0.0;
        for key in 0..2000 {
            let v = random_view(&RANGE, 3, key, 1, 500, 375);
            assert!(v.left + v.width <= 500 && v.top + v.height <= 375);
            share += f64::from(v.width * v.height) / (500.0 * 375.0) / 2000.0;
        }
        // Uniform in (0.08, 1) would be 0.54; large upright boxes don't fit and are drawn again.
        assert!((0.42..0.44).contains(&share), "mean area {share}");
    }

    #[test]
    fn impossible_ratios_fall_back_to_the_centre() {
        let v = random_view(&RANGE, 0, 1, 0, 4000, 10);
        assert_eq!((v.width, v.height, v.top, v.left), (13, 10, 0, 1993));
        let v = random_view(&RANGE, 0, 1, 0, 1, 1);
        assert_eq!((v.width, v.height), (1, 1));
    }

    #[test]
    fn seed_key_and_view_all_matter() {
        let a = random_view(&RANGE, 0, 1, 2, 500, 375);
        assert_eq!(a, random_view(&RANGE, 0, 1, 2, 500, 375));
        for (seed, key, view) in [(1, 1, 2), (0, 2, 2), (0, 1, 3)] {
            assert_ne!(a, random_view(&RANGE, seed, key, view, 500, 375));
        }
    }

    #[test]
    fn bad_bounds_are_named() {
        for bad in [
            ViewRange { scale: (0.0, 1.0), ..RANGE },
            ViewRange { scale: (0.5, 0.2), ..RANGE },
            ViewRange { ratio: (1.0, f64::NAN), ..RANGE },
            ViewRange { flip: 1.5, ..RANGE },
        ] {
            assert!(bad.check().is_err(), "{bad:?}");
        }
        assert_eq!(RANGE.check(), Ok(()));
    }
}
