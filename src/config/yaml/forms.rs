//! Values with several written forms: scalars with a unit, `off`, a word or a map, one or many.

use std::fmt;
use std::marker::PhantomData;
use std::time::Duration;

use serde::de::value::{MapAccessDeserializer, SeqAccessDeserializer, StrDeserializer};
use serde::de::{self, Deserialize, Deserializer, MapAccess, SeqAccess, Unexpected, Visitor};

/// A value that is written as one scalar.
pub(in crate::config) trait Scalar: Sized {
    /// The written form, for error messages.
    fn expected() -> String;

    fn from_text(_text: &str) -> Option<Self> {
        None
    }

    fn from_integer(_number: i64) -> Option<Self> {
        None
    }
}

struct ScalarVisitor<T>(PhantomData<T>);

impl<T: Scalar> Visitor<'_> for ScalarVisitor<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&T::expected())
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
        T::from_text(text).ok_or_else(|| E::invalid_value(Unexpected::Str(text), &self))
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<T, E> {
        T::from_integer(number).ok_or_else(|| E::invalid_type(Unexpected::Signed(number), &self))
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<T, E> {
        // A larger number is out of every key's bounds, which are checked later.
        self.visit_i64(i64::try_from(number).unwrap_or(i64::MAX))
    }

    fn visit_f64<E: de::Error>(self, number: f64) -> Result<T, E> {
        T::from_text(&number.to_string()).ok_or_else(|| E::invalid_type(Unexpected::Float(number), &self))
    }
}

/// Deserializes a scalar; to implement `Deserialize` with.
pub(in crate::config) fn scalar<'de, T: Scalar, D: Deserializer<'de>>(deserializer: D) -> Result<T, D::Error> {
    deserializer.deserialize_any(ScalarVisitor(PhantomData))
}

macro_rules! deserialize_scalar {
    ($($name:ident),*) => {
        $(impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                scalar(deserializer)
            }
        })*
    };
}

deserialize_scalar!(DurationText, Size, Count, RateText);

/// A duration with its unit: `10s`, `2m`, `1h 30m`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::config) struct DurationText(pub(in crate::config) Duration);

impl Scalar for DurationText {
    fn expected() -> String {
        "a duration with its unit, like 10s or 30m".to_owned()
    }

    fn from_text(text: &str) -> Option<Self> {
        humantime::parse_duration(text).ok().map(Self)
    }
}

/// A number of bytes, or `64KiB`, `1MiB`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::config) struct Size(pub(in crate::config) usize);

impl Scalar for Size {
    fn expected() -> String {
        "a size, like 64KiB, or a number of bytes".to_owned()
    }

    fn from_text(text: &str) -> Option<Self> {
        // `B` is last, because the other units end in it too.
        let units = [("KiB", 1 << 10), ("MiB", 1 << 20), ("B", 1)];
        let with_unit = units.iter().find_map(|(unit, factor)| Some((text.strip_suffix(unit)?, *factor)));
        let (number, factor) = with_unit.unwrap_or((text, 1));
        number.trim().parse::<usize>().ok()?.checked_mul(factor).map(Self)
    }

    fn from_integer(number: i64) -> Option<Self> {
        usize::try_from(number).ok().map(Self)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::config) struct Count(pub(in crate::config) i64);

impl Scalar for Count {
    fn expected() -> String {
        "a number".to_owned()
    }

    fn from_integer(number: i64) -> Option<Self> {
        Some(Self(number))
    }
}

/// A number of events in a duration: `60/1m`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::config) struct RateText {
    pub(in crate::config) events: u32,
    pub(in crate::config) per: Duration,
}

impl Scalar for RateText {
    fn expected() -> String {
        "a rate, like 60/1m".to_owned()
    }

    fn from_text(text: &str) -> Option<Self> {
        let (events, per) = text.split_once('/')?;
        // `parse` alone would accept "+60".
        let has_digits_only = events.bytes().all(|byte| byte.is_ascii_digit());
        let events = events.parse().ok().filter(|_| has_digits_only)?;
        DurationText::from_text(per).map(|DurationText(per)| Self { events, per })
    }
}

/// A value, or the word `off`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::config) enum OrOff<T> {
    Off,
    On(T),
}

impl<T: Scalar> Scalar for OrOff<T> {
    fn expected() -> String {
        format!("off or {}", T::expected())
    }

    fn from_text(text: &str) -> Option<Self> {
        if text == "off" { Some(Self::Off) } else { T::from_text(text).map(Self::On) }
    }

    fn from_integer(number: i64) -> Option<Self> {
        T::from_integer(number).map(Self::On)
    }
}

impl<'de, T: Scalar> Deserialize<'de> for OrOff<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        scalar(deserializer)
    }
}

/// A map that has a shorter form.
pub(in crate::config) trait Shorthand {
    /// Both forms, for error messages.
    const EXPECTED: &'static str;
}

/// A map, or a word or list that stands for one.
#[derive(Debug)]
pub(in crate::config) enum WordOrMap<W, M> {
    Word(W),
    Map(M),
}

impl<'de, W: Deserialize<'de>, M: Deserialize<'de> + Shorthand> Deserialize<'de> for WordOrMap<W, M> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(WordOrMapVisitor(PhantomData))
    }
}

struct WordOrMapVisitor<W, M>(PhantomData<(W, M)>);

impl<'de, W: Deserialize<'de>, M: Deserialize<'de> + Shorthand> Visitor<'de> for WordOrMapVisitor<W, M> {
    type Value = WordOrMap<W, M>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(M::EXPECTED)
    }

    fn visit_str<E: de::Error>(self, word: &str) -> Result<Self::Value, E> {
        W::deserialize(StrDeserializer::new(word)).map(WordOrMap::Word)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Self::Value, A::Error> {
        W::deserialize(SeqAccessDeserializer::new(list)).map(WordOrMap::Word)
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
        M::deserialize(MapAccessDeserializer::new(map)).map(WordOrMap::Map)
    }
}

/// A string, or a list of strings.
#[derive(Debug)]
pub(in crate::config) enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl OneOrMany {
    /// The strings, each with its key, if the value's own key is `key`.
    pub(in crate::config) fn with_keys(&self, key: &str) -> Vec<(String, &str)> {
        match self {
            Self::One(text) => vec![(key.to_owned(), text)],
            Self::Many(texts) => {
                texts.iter().enumerate().map(|(index, text)| (format!("{key}[{index}]"), text.as_str())).collect()
            }
        }
    }

    pub(in crate::config) fn into_vec(self) -> Vec<String> {
        match self {
            Self::One(text) => vec![text],
            Self::Many(texts) => texts,
        }
    }
}

impl<'de> Deserialize<'de> for OneOrMany {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(OneOrManyVisitor)
    }
}

struct OneOrManyVisitor;

impl<'de> Visitor<'de> for OneOrManyVisitor {
    type Value = OneOrMany;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string or a list of strings")
    }

    fn visit_str<E>(self, text: &str) -> Result<OneOrMany, E> {
        Ok(OneOrMany::One(text.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<OneOrMany, A::Error> {
        Vec::deserialize(SeqAccessDeserializer::new(list)).map(OneOrMany::Many)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scalars_are_read_in_all_forms() {
        let minute = Duration::from_secs(60);
        assert_eq!(DurationText::from_text("1m"), Some(DurationText(minute)));
        assert_eq!(DurationText::from_text("1"), None);
        assert_eq!(Size::from_text("64KiB"), Some(Size(65536)));
        assert_eq!(Size::from_text("2 MiB"), Some(Size(2 << 20)));
        assert_eq!(Size::from_text("7B"), Some(Size(7)));
        assert_eq!(Size::from_integer(-1), None);
        assert_eq!(RateText::from_text("60/1m"), Some(RateText { events: 60, per: minute }));
        for wrong in ["+60/1m", "60", "60/m", "/1m"] {
            assert_eq!(RateText::from_text(wrong), None, "{wrong}");
        }
        assert_eq!(OrOff::<Count>::from_text("off"), Some(OrOff::Off));
        assert_eq!(OrOff::<Count>::from_text("on"), None);
    }
}
