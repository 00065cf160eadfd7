//! A serde deserializer of YAML values. Its errors are data, and never contain the value that was found.

use std::fmt;

use serde::de::value::{MapDeserializer, SeqDeserializer};
use serde::de::{self, Deserializer, Expected, IntoDeserializer, Unexpected, Visitor};
use serde::forward_to_deserialize_any;
use serde_yaml::{Mapping, Value};

use crate::config::error::alternatives;

/// Why a value cannot be deserialized.
#[derive(Debug)]
pub(super) enum ValueError {
    UnknownKey { key: String, known: &'static [&'static str] },
    MissingKey(&'static str),
    UnknownWord { word: String, known: &'static [&'static str] },
    WrongType { expected: String, got: &'static str },
    WrongForm { expected: String },
    Other,
}

impl fmt::Display for ValueError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnknownKey { .. } => f.write_str("unknown key"),
            Self::MissingKey(key) => write!(f, "missing key `{key}`"),
            Self::UnknownWord { known, .. } => write!(f, "unknown value: expected {}", alternatives(known)),
            Self::WrongType { expected, got } => write!(f, "expected {expected}, got {got}"),
            Self::WrongForm { expected } => write!(f, "expected {expected}"),
            Self::Other => f.write_str("invalid value"),
        }
    }
}

impl std::error::Error for ValueError {}

impl de::Error for ValueError {
    /// Drops the message, because it may contain the value.
    fn custom<T: fmt::Display>(_message: T) -> Self {
        Self::Other
    }

    fn invalid_type(got: Unexpected<'_>, expected: &dyn Expected) -> Self {
        let got = match got {
            Unexpected::Bool(_) => "true or false",
            Unexpected::Unsigned(_) | Unexpected::Signed(_) => "a number",
            Unexpected::Float(_) => "a number with a fraction",
            Unexpected::Char(_) | Unexpected::Str(_) => "a string",
            Unexpected::Unit | Unexpected::Option => "no value",
            Unexpected::Seq => "a list",
            Unexpected::Map => "a map",
            _ => "another type",
        };
        Self::WrongType { expected: in_words(expected), got }
    }

    fn invalid_value(_got: Unexpected<'_>, expected: &dyn Expected) -> Self {
        Self::WrongForm { expected: in_words(expected) }
    }

    fn unknown_variant(word: &str, known: &'static [&'static str]) -> Self {
        Self::UnknownWord { word: word.to_owned(), known }
    }

    fn unknown_field(key: &str, known: &'static [&'static str]) -> Self {
        Self::UnknownKey { key: key.to_owned(), known }
    }

    fn missing_field(key: &'static str) -> Self {
        Self::MissingKey(key)
    }
}

/// What serde's own visitors expect, in terms of YAML.
fn in_words(expected: &dyn Expected) -> String {
    let text = expected.to_string();
    match text.as_str() {
        "i64" => "a whole number",
        "f64" => "a number",
        "a sequence" => "a list",
        "path string" => "a path",
        "a boolean" => "true or false",
        "a YAML mapping" => "a map",
        text if text.starts_with("struct ") => "a map",
        text => text,
    }
    .to_owned()
}

pub(super) struct ValueDeserializer(pub(super) Value);

impl<'de> Deserializer<'de> for ValueDeserializer {
    type Error = ValueError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ValueError> {
        match self.0 {
            Value::Null => visitor.visit_unit(),
            Value::Bool(value) => visitor.visit_bool(value),
            Value::Number(number) => match (number.as_i64(), number.as_u64(), number.as_f64()) {
                (Some(number), ..) => visitor.visit_i64(number),
                (None, Some(number), _) => visitor.visit_u64(number),
                (None, None, number) => visitor.visit_f64(number.unwrap_or(f64::NAN)),
            },
            Value::String(text) => visitor.visit_string(text),
            Value::Sequence(items) => {
                let mut items = SeqDeserializer::new(items.into_iter().map(Self));
                let list = visitor.visit_seq(&mut items)?;
                items.end().map(|()| list)
            }
            Value::Mapping(map) => {
                let mut entries = MapDeserializer::new(map.into_iter().map(|(key, value)| (Self(key), Self(value))));
                let map = visitor.visit_map(&mut entries)?;
                entries.end().map(|()| map)
            }
            Value::Tagged(tagged) => Self(tagged.value).deserialize_any(visitor),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ValueError> {
        if self.0.is_null() { visitor.visit_none() } else { visitor.visit_some(self) }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, ValueError> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        words: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, ValueError> {
        match self.0 {
            Value::String(word) => visitor.visit_enum(word.into_deserializer()),
            other => Self(other).deserialize_any(NoWord(words)).and(Err(ValueError::Other)),
        }
    }

    /// Only a top-level section has no value here: `Reader::reject_nulls` has removed the others.
    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ValueError> {
        let value = if self.0.is_null() { Value::Sequence(Vec::new()) } else { self.0 };
        Self(value).deserialize_any(visitor)
    }

    /// An absent value is an empty map, as for lists.
    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ValueError> {
        let value = if self.0.is_null() { Value::Mapping(Mapping::new()) } else { self.0 };
        Self(value).deserialize_any(visitor)
    }

    /// Refuses lists, from which serde would take the fields in order.
    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, ValueError> {
        if self.0.is_sequence() {
            return Err(de::Error::invalid_type(Unexpected::Seq, &visitor));
        }
        self.deserialize_map(visitor)
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct tuple
        tuple_struct identifier ignored_any
    }
}

impl IntoDeserializer<'_, ValueError> for ValueDeserializer {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

/// Accepts no value, so that serde reports what was found instead of one of these words.
struct NoWord(&'static [&'static str]);

impl Visitor<'_> for NoWord {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&alternatives(self.0))
    }
}
