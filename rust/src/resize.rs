//! The resize: Pillow 12.1.1's arithmetic, horizontal pass first, fed by rows as they are decoded.
//!
//! The horizontal pass takes four rows at a time and stores its result interleaved: the four
//! rows' values of one channel lie side by side. The vertical pass then reads its taps in groups
//! of four aligned rows, so that neither pass has to shuffle for the other.

use crate::filter::{Axis, Taps};
use crate::geometry::{Fit, Target, fit};
use crate::simd::{self, Level, Packed};

/// Bytes that must be readable behind the last pixel of a row that is pushed.
pub const PAD: usize = 64;

/// Rows that are pushed at once.
pub const GROUP: usize = 4;

/// Takes rows of RGB pixels from the top down.
pub trait Sink {
    /// Takes `count` rows, one each `stride` bytes, with `PAD` readable bytes behind the last.
    /// `count` is 4, or less for the last rows of the picture.
    fn push(&mut self, rows: &[u8], stride: usize, count: usize);

    /// Forgets all rows: they come again from the top.
    fn restart(&mut self);
}

/// A rectangle in pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rect {
    pub x: usize,
    pub y: usize,
    pub width: usize,
    pub height: usize,
}

/// Where a picture's pixels lie on the grid that is decoded: the box's size and the stretch of
/// the grid that it covers (which is the grid itself unless the decode is scaled).
#[derive(Debug, Clone, Copy)]
pub struct Frame {
    /// Size of the box in source pixels: the resize modes go by it.
    pub width: usize,
    pub height: usize,
    /// Size of the grid: no sample outside it is used.
    pub grid: (usize, usize),
    /// Left, top, right and bottom of the box on the grid.
    pub span: [f64; 4],
}

impl Frame {
    pub fn whole(width: usize, height: usize) -> Frame {
        let span = [0.0, 0.0, width as f64, height as f64];
        Frame { width, height, grid: (width, height), span }
    }
}

/// Buffers of one output, kept between pictures.
#[derive(Debug, Default)]
struct Plane {
    horizontal: Taps,
    vertical: Taps,
    across: Packed,
    down: Packed,
    tiles: Vec<u8>,
    /// Groups of four rows, interleaved.
    rows: Vec<u8>,
    fit: Option<(Fit, Fit)>,
    /// The next output row to make.
    next: usize,
}

/// Resizes one stream of rows into several outputs.
#[derive(Debug, Default)]
pub struct Resizer {
    /// The instructions to use instead of the current ones.
    level: Option<Level>,
    planes: Vec<Plane>,
    region: Option<Rect>,
    pushed: usize,
}

/// A resize in progress.
pub struct Resize<'a> {
    resizer: &'a mut Resizer,
    targets: &'a [Target],
    outs: &'a mut [&'a mut [u8]],
}

impl Resizer {
    /// With the instructions of `level`, which must be available.
    pub fn with_level(level: Level) -> Resizer {
        assert!(level.is_available());
        Resizer { level: Some(level), ..Resizer::default() }
    }

    /// Works out the weights and tells which part of the grid is needed.
    pub fn plan(&mut self, targets: &[Target], frame: &Frame, flip: bool) -> Rect {
        if self.planes.len() < targets.len() {
            self.planes.resize_with(targets.len(), Plane::default);
        }
        let mut need = [usize::MAX, usize::MAX, 0, 0];
        for (plane, target) in self.planes.iter_mut().zip(targets) {
            let (fx, fy) = fit(target, frame.width, frame.height);
            let [left, top, right, bottom] = frame.span;
            let x = fx.axis(target.filter, frame.grid.0, left, right);
            let y = fy.axis(target.filter, frame.grid.1, top, bottom);
            plane.horizontal.fill(&Axis { reverse: flip, ..x });
            plane.vertical.fill(&y);
            // A flip mirrors the padding too.
            let pad = if flip { target.width - fx.count - fx.pad } else { fx.pad };
            plane.fit = Some((Fit { pad, ..fx }, fy));
            plane.next = 0;
            let (x0, x1) = plane.horizontal.range();
            let (y0, y1) = plane.vertical.range();
            need = [need[0].min(x0), need[1].min(y0), need[2].max(x1), need[3].max(y1)];
        }
        let [x, y, right, bottom] = need;
        let level = self.level.unwrap_or_else(Level::current);
        for plane in &mut self.planes[..targets.len()] {
            plane.across.fill(&plane.horizontal, x, level);
            plane.down.fill(&plane.vertical, y, level);
        }
        let region = Rect { x, y, width: right - x, height: bottom - y };
        self.region = Some(region);
        self.pushed = 0;
        region
    }

    /// Starts the resize that was planned.
    pub fn start<'a>(
        &'a mut self,
        targets: &'a [Target],
        outs: &'a mut [&'a mut [u8]],
    ) -> Resize<'a> {
        let region = self.region.expect("plan comes before start");
        let groups = region.height.div_ceil(GROUP);
        for ((plane, target), out) in self.planes.iter_mut().zip(targets).zip(outs.iter_mut()) {
            let (fx, fy) = plane.fit.expect("plan comes before start");
            assert_eq!(out.len(), target.bytes(), "one output of the target's size");
            plane.rows.resize(groups * group_bytes(fx.count), 0);
            if fx.count < target.width || fy.count < target.height {
                out.fill(target.fill);
            }
        }
        Resize { resizer: self, targets, outs }
    }
}

/// Bytes of a group of four interleaved rows.
fn group_bytes(width: usize) -> usize {
    width * 3 * GROUP + PAD
}

impl Sink for Resize<'_> {
    fn push(&mut self, rows: &[u8], stride: usize, count: usize) {
        let region = self.resizer.region.expect("planned");
        assert!((1..=GROUP).contains(&count));
        assert!(self.resizer.pushed.is_multiple_of(GROUP), "only the last group may be short");
        assert!(rows.len() >= (count - 1) * stride + region.width * 3 + PAD);
        let index = self.resizer.pushed / GROUP;
        self.resizer.pushed += count;
        // The last group may be short: its missing rows weigh nothing.
        let rows = std::array::from_fn(|row| &rows[row.min(count - 1) * stride..]);
        let outs = self.outs.iter_mut();
        for ((plane, target), out) in self.resizer.planes.iter_mut().zip(self.targets).zip(outs) {
            plane.take(rows, index);
            plane.emit(out, target, index + 1);
        }
    }

    fn restart(&mut self) {
        self.resizer.pushed = 0;
        for plane in &mut self.resizer.planes {
            plane.next = 0;
        }
    }
}

impl Plane {
    /// The horizontal pass over a group of rows.
    fn take(&mut self, rows: [&[u8]; GROUP], index: usize) {
        let bytes = group_bytes(self.across.starts.len());
        let out = &mut self.rows[index * bytes..][..bytes];
        simd::horizontal(rows, &self.across, &mut self.tiles, out);
    }

    /// The vertical pass for every output row whose input is complete.
    fn emit(&mut self, out: &mut [u8], target: &Target, groups: usize) {
        let (fx, fy) = self.fit.expect("planned");
        let bytes = group_bytes(fx.count);
        while self.next < fy.count {
            let (first, count) = (self.down.starts[self.next], self.down.counts[self.next]);
            if (first + count) as usize > groups {
                return;
            }
            let at = ((fy.pad + self.next) * target.width + fx.pad) * 3;
            let out = &mut out[at..][..fx.count * 3];
            simd::vertical(&self.rows, bytes, &self.down, self.next, out);
            self.next += 1;
        }
    }
}

/// Resizes a box of RGB pixels in memory, rows of `width` pixels, into one output per target.
pub fn resize_pixels(
    pixels: &[u8],
    width: usize,
    rect: Rect,
    flip: bool,
    targets: &[Target],
) -> Vec<Vec<u8>> {
    resize_pixels_with(Resizer::default(), pixels, width, rect, flip, targets)
}

fn resize_pixels_with(
    mut resizer: Resizer,
    pixels: &[u8],
    width: usize,
    rect: Rect,
    flip: bool,
    targets: &[Target],
) -> Vec<Vec<u8>> {
    let mut outputs: Vec<Vec<u8>> = targets.iter().map(|t| vec![0; t.bytes()]).collect();
    let mut outs: Vec<&mut [u8]> = outputs.iter_mut().map(Vec::as_mut_slice).collect();
    let need = resizer.plan(targets, &Frame::whole(rect.width, rect.height), flip);
    let mut resize = resizer.start(targets, &mut outs);
    let stride = need.width * 3;
    let mut band = vec![0; stride * GROUP + PAD];
    for top in (0..need.height).step_by(GROUP) {
        let count = (need.height - top).min(GROUP);
        for row in 0..count {
            let at = (rect.y + need.y + top + row) * width + rect.x + need.x;
            band[row * stride..][..stride].copy_from_slice(&pixels[at * 3..][..stride]);
        }
        resize.push(&band, stride, count);
    }
    outputs
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::filter::Filter;
    use crate::geometry::ResizeMode;

    /// A picture of noise, with the extremes that make sums overshoot.
    fn noise(width: usize, height: usize) -> Vec<u8> {
        let mut state = (width * 7919 + height) as u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            match state >> 30 {
                0 => 0,
                1 => 255,
                _ => (state >> 16) as u8,
            }
        };
        (0..width * height * 3).map(|_| next()).collect()
    }

    #[test]
    fn every_level_equals_the_portable_code() {
        let sizes = [1, 2, 3, 5, 17, 64, 250];
        let levels: Vec<Level> = Level::ALL.into_iter().filter(|l| l.is_available()).collect();
        for (i, &width) in sizes.iter().enumerate() {
            for (j, &height) in sizes.iter().enumerate() {
                let pixels = noise(width, height);
                let rect = Rect { x: 0, y: 0, width, height };
                let filter = if (i + j) % 2 == 0 { Filter::Bicubic } else { Filter::Bilinear };
                for (tw, th) in [(1, 1), (7, 3), (32, 33), (81, 16), (224, 224)] {
                    let mode = [ResizeMode::Squash, ResizeMode::Shortest, ResizeMode::Longest]
                        [(tw + j) % 3];
                    let target = Target { height: th, width: tw, mode, filter, fill: 3 };
                    let make = |level| {
                        resize_pixels_with(
                            Resizer::with_level(level),
                            &pixels,
                            width,
                            rect,
                            i % 2 == 0,
                            &[target],
                        )
                    };
                    let expected = make(Level::Portable);
                    for level in &levels {
                        assert!(
                            make(*level) == expected,
                            "{level:?} {width}x{height} to {tw}x{th}"
                        );
                    }
                }
            }
        }
    }
}
