//! Resampling weights in Pillow's fixed-point arithmetic (version 12.1.1).

/// Fractional bits of a weight: 32 bits less 8 for the pixel and 2 for overshoot.
pub const PRECISION: u32 = 32 - 8 - 2;

/// An antialiased interpolation filter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filter {
    Bilinear,
    Bicubic,
}

impl Filter {
    fn support(self) -> f64 {
        match self {
            Filter::Bilinear => 1.0,
            Filter::Bicubic => 2.0,
        }
    }

    #[inline(always)]
    fn weight(self, x: f64) -> f64 {
        let x = x.abs();
        match self {
            Filter::Bilinear => {
                if x < 1.0 {
                    1.0 - x
                } else {
                    0.0
                }
            }
            Filter::Bicubic => {
                const A: f64 = -0.5;
                // Both pieces, then a choice: no branch to guess.
                let inner = ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0;
                let outer = (((x - 5.0) * x + 8.0) * x - 4.0) * A;
                let outer = if x < 2.0 { outer } else { 0.0 };
                if x < 1.0 { inner } else { outer }
            }
        }
    }
}

/// One direction of a resize: `input` samples, of which the stretch from `start` to `end`
/// becomes `output` samples; only `count` of these, from `first` on, are wanted.
#[derive(Debug, Clone, Copy)]
pub struct Axis {
    pub filter: Filter,
    pub input: usize,
    pub start: f64,
    pub end: f64,
    pub output: usize,
    pub first: usize,
    pub count: usize,
    /// The wanted samples come out in reverse order.
    pub reverse: bool,
}

/// The weights of the wanted samples: sample i is the sum of `weights[i * stride + j]` times
/// input sample `starts[i] + j`, for j below `lens[i]`.
#[derive(Debug, Default)]
pub struct Taps {
    pub starts: Vec<u32>,
    pub lens: Vec<u32>,
    pub weights: Vec<i32>,
    pub stride: usize,
    raw: Vec<f64>,
}

impl Taps {
    /// Fills in the weights of `axis`, reusing the buffers.
    pub fn fill(&mut self, axis: &Axis) {
        let scale = (axis.end - axis.start) / axis.output as f64;
        let filter_scale = scale.max(1.0);
        let support = axis.filter.support() * filter_scale;
        let inverse = 1.0 / filter_scale;
        self.stride = support.ceil() as usize * 2 + 1;
        self.starts.clear();
        self.lens.clear();
        self.weights.clear();
        self.weights.resize(axis.count * self.stride, 0);
        for i in 0..axis.count {
            let wanted = if axis.reverse { axis.count - 1 - i } else { i };
            let center = axis.start + ((axis.first + wanted) as f64 + 0.5) * scale;
            let low = ((center - support + 0.5) as i64).max(0) as usize;
            let high = ((center + support + 0.5) as i64).min(axis.input as i64) as usize;
            let len = high.saturating_sub(low);
            self.starts.push(low as u32);
            self.lens.push(len as u32);
            let row = &mut self.weights[i * self.stride..][..len];
            self.raw.resize(self.stride, 0.0);
            weights(axis.filter, low, center, inverse, &mut self.raw[..len], row);
        }
    }

    /// First and one past the last input sample that any wanted sample needs.
    pub fn range(&self) -> (usize, usize) {
        let low = self.starts.iter().copied().min().unwrap_or(0);
        let high = self.starts.iter().zip(&self.lens).map(|(s, l)| s + l).max().unwrap_or(0);
        (low as usize, high as usize)
    }
}

/// The weights of one output, whose first input sample is `low`.
fn weights(
    filter: Filter,
    low: usize,
    center: f64,
    inverse: f64,
    raw: &mut [f64],
    out: &mut [i32],
) {
    // Positions stay far below 2^31; a conversion from 32 bits is one instruction.
    let low = low as i32;
    match filter {
        Filter::Bilinear => {
            for (x, w) in (low..).zip(raw.iter_mut()) {
                *w = Filter::Bilinear.weight((f64::from(x) - center + 0.5) * inverse);
            }
        }
        Filter::Bicubic => {
            for (x, w) in (low..).zip(raw.iter_mut()) {
                *w = Filter::Bicubic.weight((f64::from(x) - center + 0.5) * inverse);
            }
        }
    }
    let sum: f64 = raw.iter().fold(0.0, |sum, w| sum + w);
    let sum = if sum == 0.0 { 1.0 } else { sum };
    for (weight, raw) in out.iter_mut().zip(raw) {
        let w = *raw / sum;
        let half = if w < 0.0 { -0.5 } else { 0.5 };
        *weight = (half + w * f64::from(1u32 << PRECISION)) as i32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn axis(input: usize, output: usize) -> Axis {
        let filter = Filter::Bicubic;
        Axis {
            filter,
            input,
            start: 0.0,
            end: input as f64,
            output,
            first: 0,
            count: output,
            reverse: false,
        }
    }

    #[test]
    fn the_same_size_is_the_identity() {
        let mut taps = Taps::default();
        taps.fill(&axis(7, 7));
        for i in 0..7 {
            let row = &taps.weights[i * taps.stride..][..taps.lens[i] as usize];
            for (j, w) in row.iter().enumerate() {
                let expected = if taps.starts[i] as usize + j == i { 1 << PRECISION } else { 0 };
                assert_eq!(*w, expected);
            }
        }
    }

    #[test]
    fn a_window_holds_the_weights_of_the_whole() {
        let (mut all, mut part) = (Taps::default(), Taps::default());
        all.fill(&axis(100, 31));
        part.fill(&Axis { first: 9, count: 5, reverse: true, ..axis(100, 31) });
        assert_eq!(all.stride, part.stride);
        for i in 0..5 {
            let whole = 9 + 4 - i;
            assert_eq!(part.starts[i], all.starts[whole]);
            let (p, a) = (i * all.stride, whole * all.stride);
            assert_eq!(part.weights[p..p + all.stride], all.weights[a..a + all.stride]);
        }
        assert!(part.range().0 > 0 && part.range().1 < 100);
    }

    #[test]
    fn weights_sum_to_one_within_rounding() {
        let mut taps = Taps::default();
        for (input, output) in [(1, 9), (3, 2), (640, 224), (50, 224), (5000, 3)] {
            taps.fill(&axis(input, output));
            for row in taps.weights.chunks(taps.stride) {
                let error = (row.iter().sum::<i32>() - (1 << PRECISION)).unsigned_abs() as usize;
                assert!(error <= taps.stride, "{input} to {output}: off by {error}");
            }
        }
    }
}
