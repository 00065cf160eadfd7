//! The data items of FETCH and the keys of SEARCH.

use std::num::NonZeroU32;

use imap_codec::imap_types::body::{BasicFields, Body, BodyStructure, SpecificFields};
use imap_codec::imap_types::core::{AString, IString, Literal, NString, Vec1};
use imap_codec::imap_types::datetime::DateTime;
use imap_codec::imap_types::envelope::{Address, Envelope};
use imap_codec::imap_types::fetch::{Macro, MessageDataItem, MessageDataItemName, Section};
use imap_codec::imap_types::flag::{Flag, FlagFetch};
use imap_codec::imap_types::search::SearchKey;

use super::mailbox::{Message, Selection};

pub(super) fn expanded(kind: Macro) -> Vec<MessageDataItemName<'static>> {
    use MessageDataItemName as Name;
    let mut names = vec![Name::Flags, Name::InternalDate, Name::Rfc822Size];
    match kind {
        Macro::Full => names.extend([Name::Envelope, Name::Body]),
        Macro::All => names.push(Name::Envelope),
        _ => {}
    }
    names
}

/// Whether fetching the item marks the message as read (RFC 3501 section 6.4.5).
pub(super) fn sets_seen(name: &MessageDataItemName<'_>) -> bool {
    matches!(
        name,
        MessageDataItemName::BodyExt { peek: false, .. }
            | MessageDataItemName::Rfc822
            | MessageDataItemName::Rfc822Text
    )
}

pub(super) fn item(
    name: &MessageDataItemName<'static>,
    message: &Message,
    position: NonZeroU32,
) -> Option<MessageDataItem<'static>> {
    use MessageDataItemName as Name;
    let (header, body) = message.split();
    Some(match name {
        Name::Uid => MessageDataItem::Uid(position),
        Name::Flags => MessageDataItem::Flags(message.flags().iter().cloned().map(FlagFetch::Flag).collect()),
        Name::Rfc822Size => MessageDataItem::Rfc822Size(number(message.text.len())),
        Name::Rfc822 => MessageDataItem::Rfc822(literal(message.text.as_bytes())?),
        Name::Rfc822Header => MessageDataItem::Rfc822Header(literal(header.as_bytes())?),
        Name::Rfc822Text => MessageDataItem::Rfc822Text(literal(body.as_bytes())?),
        Name::Envelope => MessageDataItem::Envelope(envelope(message)),
        Name::Body => MessageDataItem::Body(structure(body)?),
        Name::BodyStructure => MessageDataItem::BodyStructure(structure(body)?),
        Name::InternalDate => MessageDataItem::InternalDate(internal_date()?),
        Name::BodyExt { section, partial, .. } => {
            let whole = match section {
                None => message.text.clone(),
                Some(Section::Header(_)) => header.to_owned(),
                Some(Section::Text(_) | Section::Part(_)) => body.to_owned(),
                Some(Section::HeaderFields(_, fields)) => message.fields(&texts(fields), Selection::Named),
                Some(Section::HeaderFieldsNot(_, fields)) => message.fields(&texts(fields), Selection::AllOthers),
                Some(Section::Mime(_)) => message.fields(&["content-type".to_owned()], Selection::Named),
            };
            let (origin, part) = match partial {
                None => (None, whole.as_bytes()),
                Some((from, length)) => {
                    let from_byte = (*from as usize).min(whole.len());
                    let end = from_byte.saturating_add(length.get() as usize).min(whole.len());
                    (Some(*from), &whole.as_bytes()[from_byte..end])
                }
            };
            MessageDataItem::BodyExt { section: section.clone(), origin, data: literal(part)? }
        }
        _ => return None,
    })
}

pub(super) fn number(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

fn texts(fields: &Vec1<AString<'_>>) -> Vec<String> {
    fields.as_ref().iter().map(|field| String::from_utf8_lossy(field.as_ref()).into_owned()).collect()
}

fn literal(bytes: &[u8]) -> Option<NString<'static>> {
    Literal::try_from(bytes.to_vec()).ok().map(|literal| NString(Some(IString::Literal(literal))))
}

fn nstring(text: Option<&str>) -> NString<'static> {
    NString(text.and_then(|text| IString::try_from(text.to_owned()).ok()))
}

fn envelope(message: &Message) -> Envelope<'static> {
    let address = |field: &str| {
        let text = message.field(field).unwrap_or_default();
        let (name, address) = text.split_once('<').map_or((None, text), |(name, rest)| (Some(name.trim()), rest));
        let (mailbox, host) = address.trim_end_matches('>').split_once('@').unwrap_or((address, "localhost"));
        Address { name: nstring(name), adl: NString(None), mailbox: nstring(Some(mailbox)), host: nstring(Some(host)) }
    };
    Envelope {
        date: nstring(message.field("date")),
        subject: nstring(message.field("subject")),
        from: vec![address("from")],
        sender: vec![address("from")],
        reply_to: vec![address("from")],
        to: vec![address("to")],
        cc: Vec::new(),
        bcc: Vec::new(),
        in_reply_to: NString(None),
        message_id: nstring(message.field("message-id")),
    }
}

fn structure(body: &str) -> Option<BodyStructure<'static>> {
    let string = |text: &'static str| IString::try_from(text).ok();
    let basic = BasicFields {
        parameter_list: vec![(string("charset")?, string("us-ascii")?)],
        id: NString(None),
        description: NString(None),
        content_transfer_encoding: string("7bit")?,
        size: number(body.len()),
    };
    let specific = SpecificFields::Text { subtype: string("plain")?, number_of_lines: number(body.lines().count()) };
    Some(BodyStructure::Single { body: Body { basic, specific }, extension_data: None })
}

/// All messages have the same date.
fn internal_date() -> Option<DateTime> {
    let day = chrono::NaiveDate::from_ymd_opt(2026, 11, 23)?.and_hms_opt(12, 0, 0)?;
    let date = day.and_local_timezone(chrono::FixedOffset::east_opt(0)?).single()?;
    DateTime::try_from(date).ok()
}

pub(super) fn matches_key(key: &SearchKey<'_>, message: &Message, position: NonZeroU32, largest: NonZeroU32) -> bool {
    let has = |flag: Flag<'static>| message.flags().contains(&flag);
    match key {
        SearchKey::And(keys) => keys.as_ref().iter().all(|key| matches_key(key, message, position, largest)),
        SearchKey::Or(one, other) => {
            matches_key(one, message, position, largest) || matches_key(other, message, position, largest)
        }
        SearchKey::Not(key) => !matches_key(key, message, position, largest),
        SearchKey::SequenceSet(set) | SearchKey::Uid(set) => set.iter(largest).any(|chosen| chosen == position),
        SearchKey::Seen => has(Flag::Seen),
        SearchKey::Unseen => !has(Flag::Seen),
        SearchKey::Flagged => has(Flag::Flagged),
        SearchKey::Deleted => has(Flag::Deleted),
        SearchKey::Undeleted => !has(Flag::Deleted),
        SearchKey::New | SearchKey::Recent => false,
        SearchKey::Subject(text) => contains(message.field("subject"), text.as_ref()),
        SearchKey::From(text) => contains(message.field("from"), text.as_ref()),
        SearchKey::Text(text) | SearchKey::Body(text) => contains(Some(&message.text), text.as_ref()),
        SearchKey::Header(name, text) => {
            contains(message.field(&String::from_utf8_lossy(name.as_ref())), text.as_ref())
        }
        _ => true,
    }
}

fn contains(text: Option<&str>, part: &[u8]) -> bool {
    let part = String::from_utf8_lossy(part).to_ascii_lowercase();
    text.is_some_and(|text| text.to_ascii_lowercase().contains(&part))
}
