//! `promptkd._rust`: image decoding for promptkd. Only the module is put together here.

pub mod baseline;
pub mod cache;
pub mod decode;
pub mod error;
pub mod filter;
pub mod geometry;
pub mod helpers;
pub mod index;
pub mod jpeg;
pub mod markers;
pub mod order;
pub mod orient;
pub mod picture;
pub mod png;
mod python;
mod python_cache;
mod python_data;
pub mod raster;
pub mod resize;
pub mod shard;
pub mod simd;
pub mod stream;
pub mod tar;
pub mod view;
pub mod webp;

use pyo3::prelude::*;

#[pymodule(gil_used = false)]
fn _rust(module: &Bound<'_, PyModule>) -> PyResult<()> {
    python_cache::register(module)?;
    python_data::register(module)?;
    python::register(module)
}
