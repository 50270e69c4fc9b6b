// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Free text in files of lines and colons, and keys as clients send them: percent-encoding (RFC 3986 section 2.1), in
//! PVE's choice of characters.

use percent_encoding::{AsciiSet, CONTROLS, percent_decode_str, utf8_percent_encode};

/// What stands for something else in such files. Whatever is not ASCII is always encoded.
const SPECIAL: &AsciiSet = &CONTROLS.add(b':').add(b'%');

/// On one line, without a colon.
pub(crate) fn encode(text: &str) -> String {
    utf8_percent_encode(text, SPECIAL).to_string()
}

/// The text again. A `%` that nothing follows is itself, and what is no UTF-8 becomes U+FFFD: people edit such files.
pub(crate) fn decode(text: &str) -> String {
    percent_decode_str(text).decode_utf8_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_survives_and_what_is_none_is_left() {
        let text = "a:b 100%\n\tü #";
        assert_eq!(encode(text), "a%3Ab 100%25%0A%09%C3%BC #");
        assert_eq!(decode(&encode(text)), text);
        assert_eq!(decode("%zz %+1 %4"), "%zz %+1 %4");
        assert_eq!(decode("%ff"), "\u{fffd}");
    }
}
