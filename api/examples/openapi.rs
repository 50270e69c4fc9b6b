// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Lists the API's routes from the table that also validates and documents them:
//!
//!     cargo run -p atoll-api --example openapi

use atoll_api::openapi;

#[expect(clippy::print_stdout, reason = "an example talks to its reader")]
fn main() {
    let document = openapi::document();
    let paths = document["paths"]
        .as_object()
        .expect("an OpenAPI document has paths");
    for (path, methods) in paths {
        let methods = methods.as_object().expect("a path has methods");
        let names: Vec<_> = methods.keys().map(|name| name.to_uppercase()).collect();
        println!("{:16} {path}", names.join(" "));
    }
}
