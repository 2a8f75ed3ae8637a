//! A decoder of plain baseline JPEG files, for the wanted blocks only.
//!
//! Entropy decoding is our own; the transform, the upsampling and the colour conversion are
//! libjpeg-turbo's kernels, so the pixels are libjpeg's. Whatever is not plain and sound is left
//! to libjpeg, which alone decides about errors: every doubt here is a `None`.

#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod colour;
mod entropy;
mod header;
mod huffman;
mod kernels;
mod output;

use std::ops::Range;

use crate::markers::Markers;
use crate::resize::{Rect, Sink};
use entropy::{Bits, Clean};
use header::{Header, Sampling, Scale};
use huffman::Table;
use kernels::{Plane, Queue};
use output::Output;

/// Buffers kept between pictures.
#[derive(Debug, Default)]
pub struct Scratch {
    clean: Clean,
    /// The Huffman tables of each component.
    dc: Vec<Table>,
    ac: Vec<Table>,
    planes: Vec<Plane>,
    output: Output,
}

/// Whether this processor has what the decoder needs.
pub fn is_available() -> bool {
    #[cfg(target_arch = "x86_64")]
    return is_x86_feature_detected!("avx2") && is_x86_feature_detected!("bmi2");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Which minimum coded units a region needs, and which of their blocks.
#[derive(Debug, Clone)]
struct Wanted {
    columns: Range<usize>,
    rows: Range<usize>,
    /// Pixel rows whose luma is needed.
    luma: Range<usize>,
    /// Minimum coded units in a row of the picture.
    across: usize,
}

impl Wanted {
    fn new(header: &Header, scale: &Scale, region: Rect) -> Wanted {
        let (h, v) = header.sampling.luma();
        let across = header.width.div_ceil(8 * h);
        let down = header.height.div_ceil(8 * v);
        let (width, height) = (scale.luma * h, scale.luma * v);
        // Interpolated chroma needs its neighbours.
        let (mx, my) = scale.sampling.luma();
        let (mx, my) = (mx - 1, my - 1);
        let start = region.x.saturating_sub(mx) / width;
        let end = (region.x + region.width + mx).div_ceil(width).min(across);
        let rows = region.y.saturating_sub(my) / height
            ..(region.y + region.height + my).div_ceil(height).min(down);
        let luma = region.y..region.y + region.height;
        // The kernels treat fewer than three columns of chroma in another way.
        let narrow = scale.chroma < 3;
        let start = start.saturating_sub(usize::from(end == across || narrow));
        let columns = start..if narrow { end.max(start + 2).min(across) } else { end };
        Wanted { columns, rows, luma, across }
    }
}

/// Decodes `region` of the picture at 1/`denominator` of its size and pushes its rows. `None`
/// where libjpeg has to do it; rows may have been pushed by then. Without `pixels` the blocks are
/// read, and no row is made.
pub fn decode(
    markers: &Markers,
    region: Rect,
    denominator: usize,
    pixels: bool,
    scratch: &mut Scratch,
    sink: &mut dyn Sink,
) -> Option<()> {
    let header = Header::read(markers)?;
    let scale = Scale::new(&header, denominator)?;
    scratch.clean.fill(&markers.data[header.data..])?;
    let count = header.components.len();
    if scratch.dc.len() < count {
        scratch.dc.resize_with(count, Table::new);
        scratch.ac.resize_with(count, Table::new);
        scratch.planes.resize_with(count, Plane::default);
    }
    for (i, component) in header.components.iter().enumerate() {
        scratch.dc[i].fill(&component.dc, true)?;
        scratch.ac[i].fill(&component.ac, false)?;
    }
    let wanted = Wanted::new(&header, &scale, region);
    let down = header.height.div_ceil(8 * header.sampling.luma().1);
    let units = wanted.across * down;
    let stretches = if header.restart == 0 { 1 } else { units.div_ceil(header.restart) };
    if scratch.clean.stretches.len() != stretches {
        return None;
    }
    scratch.output.start(&header, &scale, &wanted.columns, region, &mut scratch.planes);
    // SAFETY: the caller has checked `is_available`.
    #[cfg(target_arch = "x86_64")]
    return unsafe {
        if pixels {
            scan::<true>(&header, &scale, &wanted, scratch, sink)
        } else {
            scan::<false>(&header, &scale, &wanted, scratch, sink)
        }
    };
    #[cfg(not(target_arch = "x86_64"))]
    None
}

/// Where the decoder stands in the scan.
struct Cursor<'a> {
    bits: Bits<'a>,
    clean: &'a Clean,
    restart: usize,
    unit: usize,
    means: [i32; 3],
    started: bool,
}

impl<'a> Cursor<'a> {
    /// At the last restart marker before `unit`, or at the start.
    fn new(clean: &'a Clean, restart: usize, unit: usize) -> Cursor<'a> {
        let stretch = unit.checked_div(restart).unwrap_or(0);
        let bits = Bits::new(clean, clean.stretches[stretch].0);
        Cursor { bits, clean, restart, unit: stretch * restart, means: [0; 3], started: false }
    }

    /// Comes before each unit: passes a restart marker where one is due.
    #[inline(always)]
    fn next(&mut self) -> Option<()> {
        if self.restart != 0 && self.unit.is_multiple_of(self.restart) {
            self.pass_restart()?;
        }
        self.unit += 1;
        Some(())
    }

    fn pass_restart(&mut self) -> Option<()> {
        let stretch = self.unit / self.restart;
        let (start, _) = self.clean.stretches[stretch];
        // Where decoding begins at a marker, nothing comes before it.
        if self.started && !self.bits.is_at(start) {
            return None;
        }
        self.started = true;
        self.bits = Bits::new(self.clean, start);
        self.means = [0; 3];
        Some(())
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,bmi1,bmi2,lzcnt")]
fn scan<const PIXELS: bool>(
    header: &Header,
    scale: &Scale,
    wanted: &Wanted,
    scratch: &mut Scratch,
    sink: &mut dyn Sink,
) -> Option<()> {
    let Scratch { clean, dc, ac, planes, output } = scratch;
    let mut cursor = Cursor::new(clean, header.restart, wanted.rows.start * wanted.across);
    let mut queues: [Queue; 3] = std::array::from_fn(|i| {
        let component = &header.components[i.min(header.components.len() - 1)];
        Queue::new(&component.quant, if i == 0 { scale.luma } else { scale.chroma })
    });
    let (h, v) = header.sampling.luma();
    let last = wanted.rows.end - 1;
    let start = cursor.unit;
    for unit in start..wanted.rows.start * wanted.across {
        debug_assert_eq!(unit, cursor.unit);
        skip_unit(&mut cursor, header.sampling, dc, ac)?;
    }
    for row in wanted.rows.clone() {
        for _ in 0..wanted.columns.start {
            skip_unit(&mut cursor, header.sampling, dc, ac)?;
        }
        for column in 0..wanted.columns.len() {
            cursor.next()?;
            for by in 0..v {
                let top = (row * v + by) * scale.luma;
                let needed = top < wanted.luma.end && top + scale.luma > wanted.luma.start;
                for bx in 0..h {
                    let mut place = Place {
                        plane: &mut planes[0],
                        row: output.lag(0) + by * scale.luma,
                        column: (column * h + bx) * scale.luma,
                        side: scale.luma,
                    };
                    let place = needed.then_some(&mut place);
                    let tables = (&dc[0], &ac[0]);
                    one_block::<PIXELS>(&mut cursor, 0, tables, place, &mut queues[0])?;
                }
            }
            for i in 1..header.components.len() {
                let mut place = Place {
                    plane: &mut planes[i],
                    row: output.lag(i),
                    column: column * scale.chroma,
                    side: scale.chroma,
                };
                let tables = (&dc[i], &ac[i]);
                one_block::<PIXELS>(&mut cursor, i, tables, Some(&mut place), &mut queues[i])?;
            }
        }
        if row < last {
            for _ in wanted.columns.end..wanted.across {
                skip_unit(&mut cursor, header.sampling, dc, ac)?;
            }
        }
        if PIXELS {
            for (queue, plane) in queues.iter_mut().zip(planes.iter_mut()) {
                queue.flush(plane);
            }
            output.emit(row, row == last, planes, sink);
        }
    }
    let stretch = (cursor.unit - 1).checked_div(header.restart).unwrap_or(0);
    cursor.bits.is_within(clean.stretches[stretch].1).then_some(())
}

#[inline(always)]
fn skip_unit(cursor: &mut Cursor, sampling: Sampling, dc: &[Table], ac: &[Table]) -> Option<()> {
    cursor.next()?;
    let (h, v) = sampling.luma();
    for _ in 0..h * v {
        skip_block(cursor, 0, dc, ac)?;
    }
    if sampling != Sampling::Grey {
        skip_block(cursor, 1, dc, ac)?;
        skip_block(cursor, 2, dc, ac)?;
    }
    Some(())
}

#[inline(always)]
fn skip_block(cursor: &mut Cursor, i: usize, dc: &[Table], ac: &[Table]) -> Option<()> {
    cursor.bits.has_room().then_some(())?;
    let difference = cursor.bits.skip_block(&dc[i], &ac[i])?;
    cursor.means[i] = cursor.means[i].wrapping_add(difference);
    Some(())
}

/// Where a block's pixels go.
struct Place<'a> {
    plane: &'a mut Plane,
    row: usize,
    column: usize,
    /// Pixels of a side of the block.
    side: usize,
}

#[inline(always)]
fn one_block<const PIXELS: bool>(
    cursor: &mut Cursor,
    i: usize,
    (dc, ac): (&Table, &Table),
    place: Option<&mut Place>,
    queue: &mut Queue,
) -> Option<()> {
    cursor.bits.has_room().then_some(())?;
    let Some(place) = place else {
        let difference = cursor.bits.skip_block(dc, ac)?;
        cursor.means[i] = cursor.means[i].wrapping_add(difference);
        return Some(());
    };
    let (difference, detailed) = if place.side == 1 {
        (cursor.bits.skip_block(dc, ac)?, false)
    } else {
        let (order, coefficients) = queue.next();
        cursor.bits.block(dc, ac, order, coefficients)?
    };
    let mean = cursor.means[i].wrapping_add(difference);
    cursor.means[i] = mean;
    // Sound files stay within 12 bits or so; beyond, the kernels' 16-bit arithmetic wraps.
    i16::try_from(mean).ok()?;
    if !PIXELS {
        queue.clear();
        return Some(());
    }
    let product = mean * queue.step();
    if !detailed && product.abs() < 4092 {
        place.plane.put_mean(place.row, place.column, place.side, product);
        return Some(());
    }
    (place.side > 1).then_some(())?;
    queue.push(mean as i16, (place.row, place.column), place.side, place.plane);
    Some(())
}
