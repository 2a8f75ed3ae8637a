//! How a picture, or a box of one, is fitted into an output of fixed size: open_clip's resize
//! modes, with the rounding of torchvision and Python.

use crate::filter::{Axis, Filter};

/// What happens when the output has another shape than the picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResizeMode {
    /// Stretched to the output.
    Squash,
    /// The shortest side fills the output, the rest is cut off around the centre.
    Shortest,
    /// The longest side fills the output, the rest is padded around the centre.
    Longest,
}

/// One output of a decode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target {
    pub height: usize,
    pub width: usize,
    pub mode: ResizeMode,
    pub filter: Filter,
    pub fill: u8,
}

impl Target {
    pub fn bytes(&self) -> usize {
        self.height * self.width * 3
    }
}

/// Along one direction: the picture becomes `output` samples, of which `count` from `first` on
/// are written to the target from `pad` on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fit {
    pub output: usize,
    pub first: usize,
    pub count: usize,
    pub pad: usize,
}

impl Fit {
    fn centred(output: usize, target: usize) -> Fit {
        if output <= target {
            return Fit { output, first: 0, count: output, pad: (target - output) / 2 };
        }
        let first = ((output - target) as f64 / 2.0).round_ties_even() as usize;
        Fit { output, first, count: target, pad: 0 }
    }

    /// The axis of this fit over `input` samples from `start` to `end`.
    pub fn axis(&self, filter: Filter, input: usize, start: f64, end: f64) -> Axis {
        let Fit { output, first, count, .. } = *self;
        Axis { filter, input, start, end, output, first, count, reverse: false }
    }
}

/// Places a picture of `width` x `height` in `target`: the horizontal and the vertical fit.
pub fn fit(target: &Target, width: usize, height: usize) -> (Fit, Fit) {
    let (tw, th) = (target.width, target.height);
    let (ow, oh) = match target.mode {
        ResizeMode::Squash => (tw, th),
        ResizeMode::Shortest if tw == th => {
            let long = |long: usize, short: usize| (tw * long) / short;
            if width <= height { (tw, long(height, width)) } else { (long(width, height), th) }
        }
        ResizeMode::Shortest => keep_ratio(width, height, tw, th, f64::min),
        ResizeMode::Longest => keep_ratio(width, height, tw, th, f64::max),
    };
    (Fit::centred(ow, tw), Fit::centred(oh, th))
}

fn keep_ratio(
    w: usize,
    h: usize,
    tw: usize,
    th: usize,
    pick: fn(f64, f64) -> f64,
) -> (usize, usize) {
    let ratio = pick(h as f64 / th as f64, w as f64 / tw as f64);
    let side = |x: usize| ((x as f64 / ratio).round_ties_even() as usize).max(1);
    (side(w), side(h))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(width: usize, height: usize, mode: ResizeMode) -> Target {
        Target { height, width, mode, filter: Filter::Bicubic, fill: 0 }
    }

    #[test]
    fn shortest_side_as_torchvision() {
        let t = target(224, 224, ResizeMode::Shortest);
        // int(224 * 500 / 375) = 298; int(round((298 - 224) / 2)) = 37
        let (x, y) = fit(&t, 500, 375);
        assert_eq!(x, Fit { output: 298, first: 37, count: 224, pad: 0 });
        assert_eq!(y, Fit { output: 224, first: 0, count: 224, pad: 0 });
        // An odd rest: 299 - 224 = 75, and Python rounds 37.5 to 38, but 36.5 to 36.
        assert_eq!(Fit::centred(299, 224).first, 38);
        assert_eq!(Fit::centred(297, 224).first, 36);
    }

    #[test]
    fn longest_side_is_padded() {
        let (x, y) = fit(&target(64, 64, ResizeMode::Longest), 100, 41);
        assert_eq!(x, Fit { output: 64, first: 0, count: 64, pad: 0 });
        assert_eq!(y, Fit { output: 26, first: 0, count: 26, pad: 19 });
        let (_, y) = fit(&target(64, 64, ResizeMode::Longest), 30_000, 1);
        assert_eq!(y.output, 1);
    }

    #[test]
    fn an_extreme_shape_needs_no_extreme_memory() {
        let (x, y) = fit(&target(224, 224, ResizeMode::Shortest), 60_000, 1);
        assert_eq!((x.output, x.count, y.count), (224 * 60_000, 224, 224));
    }
}
