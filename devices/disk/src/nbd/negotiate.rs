// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Fixed newstyle negotiation: the client lists exports, asks about them, and chooses one (`doc/proto.md`,
//! "Option haggling").

use std::io::{Read, Write};

use zerocopy::IntoBytes;

use super::wire::{
    self, Fields, HELLO, OPTION, OPTION_REPLY, OptionHead, OptionReplyHead, ability, handshake,
    info, option, reply,
};
use super::{Export, NbdError};

/// Longest data of an option: a name (4096 bytes at most) and the queries of a client that means well.
const OPTION_BYTES_MAX: u32 = 64 << 10;
/// Options after which a client that has not chosen is sent away.
const OPTIONS_MAX: usize = 1000;
/// What clients should read or write at once, and what they may, bytes.
const PREFERRED_BYTES: u32 = 1 << 20;
pub(super) const PAYLOAD_BYTES_MAX: u32 = 32 << 20;

/// Metadata contexts, by their number on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Context {
    /// `base:allocation`: everything is data; zeroes are found by reading.
    Allocation = 1,
    /// `qemu:dirty-bitmap:NAME`.
    Changed = 2,
}

/// What a connection is about.
pub(super) struct Agreed<'a> {
    pub(super) export: &'a Export,
    pub(super) structured: bool,
    pub(super) contexts: Vec<Context>,
}

/// Until the client has chosen; `None` when it leaves.
pub(super) fn negotiate<'a>(
    stream: &mut (impl Read + Write),
    exports: &'a [Export],
) -> Result<Option<Agreed<'a>>, NbdError> {
    let flags = handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES;
    let mut hello = Vec::new();
    hello.extend(HELLO.to_be_bytes());
    hello.extend(OPTION.to_be_bytes());
    hello.extend(flags.to_be_bytes());
    stream.write_all(&hello)?;
    let mut answer = [0; 4];
    stream.read_exact(&mut answer)?;
    let answer = u32::from_be_bytes(answer);
    if answer & !u32::from(flags) != 0 || answer & u32::from(handshake::FIXED_NEWSTYLE) == 0 {
        return Err(NbdError::Protocol("it knows only the old negotiation"));
    }
    let mut haggling = Haggling {
        stream,
        exports,
        no_zeroes: answer & u32::from(handshake::NO_ZEROES) != 0,
        structured: false,
        contexts: None,
    };
    for _ in 0..OPTIONS_MAX {
        match haggling.option()? {
            Step::Next => {}
            Step::Leave => return Ok(None),
            Step::Go(export) => return Ok(Some(haggling.agree(export))),
        }
    }
    Err(NbdError::Protocol("it asks and asks and chooses nothing"))
}

enum Step<'e> {
    Next,
    Leave,
    Go(&'e Export),
}

struct Haggling<'s, 'e, S> {
    stream: &'s mut S,
    exports: &'e [Export],
    no_zeroes: bool,
    structured: bool,
    /// The contexts that were chosen last, and for which export.
    contexts: Option<(&'e Export, Vec<Context>)>,
}

impl<'e, S: Read + Write> Haggling<'_, 'e, S> {
    /// Takes one option and answers it.
    fn option(&mut self) -> Result<Step<'e>, NbdError> {
        let head: OptionHead = wire::read(self.stream)?;
        if head.magic.get() != OPTION {
            return Err(NbdError::Protocol("it sends something that is no option"));
        }
        let (option, length) = (head.option.get(), head.length.get());
        if length > OPTION_BYTES_MAX {
            self.reply(option, reply::TOO_BIG, b"an option has at most 64 KiB")?;
            return Err(NbdError::Protocol("it sends an option of more than 64 KiB"));
        }
        let mut data = vec![0; usize::try_from(length).expect("64 KiB")];
        self.stream.read_exact(&mut data)?;
        match option {
            option::EXPORT_NAME => self.choose_at_once(&data),
            option::ABORT => {
                // Its client may be gone already.
                let _ = self.reply(option, reply::ACK, &[]);
                Ok(Step::Leave)
            }
            option::LIST => self.list(&data),
            option::INFO | option::GO => self.tell(option, &data),
            option::STRUCTURED_REPLY if data.is_empty() => {
                self.structured = true;
                self.acknowledge(option)
            }
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => self.choose(option, &data),
            option::STRUCTURED_REPLY => self.invalid(option),
            _ => {
                self.reply(option, reply::UNSUPPORTED, b"not offered here")?;
                Ok(Step::Next)
            }
        }
    }

    fn agree(&mut self, export: &'e Export) -> Agreed<'e> {
        let contexts = self.contexts.take();
        let contexts = contexts.filter(|(of, _)| std::ptr::eq(*of, export));
        Agreed {
            export,
            structured: self.structured,
            contexts: contexts.map(|(_, contexts)| contexts).unwrap_or_default(),
        }
    }

    fn find(&self, name: &str) -> Option<&'e Export> {
        match name {
            "" => self.exports.first(),
            _ => self.exports.iter().find(|export| export.name == name),
        }
    }

    /// The old way to choose, whose answer cannot be a refusal.
    fn choose_at_once(&mut self, data: &[u8]) -> Result<Step<'e>, NbdError> {
        let name = std::str::from_utf8(data).unwrap_or("\u{fffd}");
        let Some(export) = self.find(name) else {
            return Err(NbdError::Protocol("it wants an export that does not exist"));
        };
        let mut answer = Vec::new();
        answer.extend(export.content.size_bytes().to_be_bytes());
        answer.extend(self.abilities(export).to_be_bytes());
        if !self.no_zeroes {
            answer.extend([0; 124]);
        }
        self.stream.write_all(&answer)?;
        Ok(Step::Go(export))
    }

    fn list(&mut self, data: &[u8]) -> Result<Step<'e>, NbdError> {
        if !data.is_empty() {
            return self.invalid(option::LIST);
        }
        for export in self.exports {
            self.reply(option::LIST, reply::SERVER, &text(&export.name))?;
        }
        self.acknowledge(option::LIST)
    }

    /// Size and abilities; with `GO` also the end of the negotiation.
    fn tell(&mut self, option: u32, data: &[u8]) -> Result<Step<'e>, NbdError> {
        let mut fields = Fields(data);
        let name = fields.text();
        let count = fields.u16().map(usize::from);
        let (Some(name), Some(count)) = (name, count) else {
            return self.invalid(option);
        };
        if fields.0.len() != count * 2 {
            return self.invalid(option);
        }
        let Some(export) = self.find(name) else {
            return self.unknown(option);
        };
        let size = export.content.size_bytes();
        let mut about = Vec::new();
        about.extend(info::EXPORT.to_be_bytes());
        about.extend(size.to_be_bytes());
        about.extend(self.abilities(export).to_be_bytes());
        self.reply(option, reply::INFO, &about)?;
        while let Some(wanted) = fields.u16() {
            let mut about = wanted.to_be_bytes().to_vec();
            match wanted {
                info::NAME => about.extend(export.name.as_bytes()),
                info::BLOCK_SIZE => {
                    about.extend(
                        [
                            export.content.unit_bytes(),
                            PREFERRED_BYTES,
                            PAYLOAD_BYTES_MAX,
                        ]
                        .map(u32::to_be_bytes)
                        .concat(),
                    );
                }
                _ => continue,
            }
            self.reply(option, reply::INFO, &about)?;
        }
        self.reply(option, reply::ACK, &[])?;
        Ok(match option {
            option::GO => Step::Go(export),
            _ => Step::Next,
        })
    }

    /// Lists or chooses metadata contexts. A query may name a whole namespace.
    fn choose(&mut self, option: u32, data: &[u8]) -> Result<Step<'e>, NbdError> {
        let mut fields = Fields(data);
        let (Some(name), Some(count)) = (fields.text(), fields.u32()) else {
            return self.invalid(option);
        };
        let mut queries = Vec::new();
        for _ in 0..count {
            let Some(query) = fields.text() else {
                return self.invalid(option);
            };
            queries.push(query);
        }
        if !self.structured || !fields.0.is_empty() {
            return self.invalid(option);
        }
        let listing = option == option::LIST_META_CONTEXT;
        if !listing {
            self.contexts = None;
        }
        let Some(export) = self.find(name) else {
            return self.unknown(option);
        };
        let mut chosen = Vec::new();
        for (context, name) in contexts(export) {
            let wanted = |query: &&str| {
                *query == name || listing && query.ends_with(':') && name.starts_with(*query)
            };
            if queries.iter().any(wanted) || listing && queries.is_empty() {
                let mut about = (context as u32).to_be_bytes().to_vec();
                about.extend(name.as_bytes());
                self.reply(option, reply::META_CONTEXT, &about)?;
                chosen.push(context);
            }
        }
        if !listing {
            self.contexts = Some((export, chosen));
        }
        self.acknowledge(option)
    }

    fn abilities(&self, export: &Export) -> u16 {
        let fragments = if self.structured { ability::SEND_DF } else { 0 };
        export.content.abilities() | fragments
    }

    fn acknowledge(&mut self, option: u32) -> Result<Step<'e>, NbdError> {
        self.reply(option, reply::ACK, &[])?;
        Ok(Step::Next)
    }

    fn invalid(&mut self, option: u32) -> Result<Step<'e>, NbdError> {
        self.reply(option, reply::INVALID, b"not as the protocol has it")?;
        Ok(Step::Next)
    }

    fn unknown(&mut self, option: u32) -> Result<Step<'e>, NbdError> {
        self.reply(option, reply::UNKNOWN, b"there is no export of that name")?;
        Ok(Step::Next)
    }

    fn reply(&mut self, option: u32, kind: u32, data: &[u8]) -> Result<(), NbdError> {
        let head = OptionReplyHead {
            magic: OPTION_REPLY.into(),
            option: option.into(),
            kind: kind.into(),
            length: u32::try_from(data.len()).expect("names are short").into(),
        };
        let mut message = head.as_bytes().to_vec();
        message.extend(data);
        Ok(self.stream.write_all(&message)?)
    }
}

/// What can be told about an export's blocks.
fn contexts(export: &Export) -> Vec<(Context, String)> {
    let mut contexts = vec![(Context::Allocation, "base:allocation".to_owned())];
    if let Some((name, _)) = &export.changed {
        contexts.push((Context::Changed, format!("qemu:dirty-bitmap:{name}")));
    }
    contexts
}

fn text(text: &str) -> Vec<u8> {
    let length = u32::try_from(text.len()).expect("names are short");
    [&length.to_be_bytes()[..], text.as_bytes()].concat()
}
