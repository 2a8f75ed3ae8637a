//! EXIF orientations, as Pillow's `ImageOps.exif_transpose` applies them.

use crate::resize::{GROUP, PAD, Rect, Sink};

/// Column X, row Y of the upright picture is stored at column X, row Y, or at column Y, row X
/// when swapped, counted from the right or from the bottom when flipped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Orientation {
    swap: bool,
    flip_x: bool,
    flip_y: bool,
}

impl Orientation {
    /// From the EXIF number, 1 to 8.
    pub fn new(number: u8) -> Orientation {
        let swap = (5..=8).contains(&number);
        let flip_x = matches!(number, 2 | 3 | 7 | 8);
        let flip_y = matches!(number, 3 | 4 | 6 | 7);
        Orientation { swap, flip_x, flip_y }
    }

    pub fn is_upright(self) -> bool {
        self == Orientation::new(1)
    }

    /// The upright size of a stored size, or the other way round.
    pub fn size(self, (width, height): (usize, usize)) -> (usize, usize) {
        if self.swap { (height, width) } else { (width, height) }
    }

    /// Where an upright rectangle is stored in a picture of stored size `stored`.
    pub fn stored(self, rect: Rect, stored: (usize, usize)) -> Rect {
        let Rect { x, y, width, height } = rect;
        let (x, y) = if self.swap { (y, x) } else { (x, y) };
        let (width, height) = self.size((width, height));
        let x = if self.flip_x { stored.0 - x - width } else { x };
        let y = if self.flip_y { stored.1 - y - height } else { y };
        Rect { x, y, width, height }
    }

    /// An upright stretch of coordinates (left, top, right, bottom) in source pixels, on the
    /// upright grid of a picture that is decoded at 1/`denominator` of its size.
    pub fn span(self, span: [f64; 4], stored: (usize, usize), denominator: usize) -> [f64; 4] {
        let d = denominator as f64;
        // Rest pixels lie at the stored right and bottom, so flipped coordinates shift.
        let slack = |size: usize, flip: bool| {
            if flip { size.div_ceil(denominator) as f64 - size as f64 / d } else { 0.0 }
        };
        let slack = (slack(stored.0, self.flip_x), slack(stored.1, self.flip_y));
        let (sx, sy) = if self.swap { (slack.1, slack.0) } else { slack };
        [span[0] / d + sx, span[1] / d + sy, span[2] / d + sx, span[3] / d + sy]
    }
}

/// Collects a stored region to hand it on upright.
pub struct Collector {
    pixels: Vec<u8>,
    width: usize,
    height: usize,
}

impl Collector {
    pub fn new(region: Rect) -> Collector {
        let pixels = Vec::with_capacity(region.width * region.height * 3);
        Collector { pixels, width: region.width, height: region.height }
    }

    /// Pushes the rows of the upright region.
    pub fn replay(&self, orientation: Orientation, sink: &mut dyn Sink) {
        let (width, height) = orientation.size((self.width, self.height));
        let stride = width * 3;
        let mut band = vec![0; stride * GROUP + PAD];
        for top in (0..height).step_by(GROUP) {
            let count = (height - top).min(GROUP);
            for row in 0..count {
                for x in 0..width {
                    let at = Rect { x, y: top + row, width: 1, height: 1 };
                    let Rect { x: sx, y: sy, .. } =
                        orientation.stored(at, (self.width, self.height));
                    let pixel = &self.pixels[(sy * self.width + sx) * 3..][..3];
                    band[row * stride + x * 3..][..3].copy_from_slice(pixel);
                }
            }
            sink.push(&band, stride, count);
        }
    }
}

impl Sink for Collector {
    fn push(&mut self, rows: &[u8], stride: usize, count: usize) {
        for row in 0..count {
            self.pixels.extend_from_slice(&rows[row * stride..][..self.width * 3]);
        }
    }

    fn restart(&mut self) {
        self.pixels.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Rows(Vec<Vec<u8>>);

    impl Sink for Rows {
        fn push(&mut self, rows: &[u8], stride: usize, count: usize) {
            for row in 0..count {
                self.0.push(rows[row * stride..][..stride].to_vec());
            }
        }

        fn restart(&mut self) {
            self.0.clear();
        }
    }

    #[test]
    fn rotations_of_two_pixels() {
        let region = Rect { x: 0, y: 0, width: 2, height: 1 };
        let mut collector = Collector::new(region);
        collector.push(&[1, 1, 1, 2, 2, 2], 6, 1);
        let upright = |number| {
            let mut rows = Rows(vec![]);
            collector.replay(Orientation::new(number), &mut rows);
            rows.0.iter().map(|r| r.iter().step_by(3).copied().collect()).collect::<Vec<Vec<u8>>>()
        };
        assert_eq!(upright(1), [[1, 2]]);
        assert_eq!(upright(3), [[2, 1]]);
        assert_eq!(upright(6), [[1], [2]]);
        assert_eq!(upright(8), [[2], [1]]);
    }

    #[test]
    fn stored_rectangles_stay_inside() {
        for number in 1..=8 {
            let o = Orientation::new(number);
            let (w, h) = o.size((7, 5));
            let all = Rect { x: 0, y: 0, width: w, height: h };
            assert_eq!(o.stored(all, (7, 5)), Rect { x: 0, y: 0, width: 7, height: 5 });
        }
        let corner = Rect { x: 0, y: 0, width: 1, height: 2 };
        let stored = Orientation::new(6).stored(corner, (7, 5));
        assert_eq!(stored, Rect { x: 0, y: 4, width: 2, height: 1 });
    }
}
