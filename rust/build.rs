//! Compiles the C shim around libjpeg-turbo's libjpeg API.

use std::{env, path::PathBuf};

fn main() {
    println!("cargo:rerun-if-changed=shim/jpeg_shim.c");
    let include = env::var_os("DEP_TURBOJPEG_INCLUDE").map(PathBuf::from);
    let include = include.expect("turbojpeg-sys tells where its headers are");
    cc::Build::new()
        .file("shim/jpeg_shim.c")
        .include(include)
        .opt_level(3)
        .warnings(true)
        .extra_warnings(true)
        // What the shim reads after longjmp has returned to it is volatile.
        .flag_if_supported("-Wno-clobbered")
        .compile("promptkd_jpeg_shim");
}
