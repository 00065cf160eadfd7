//! Values with a form of their own: durations, sizes, and things that are one word or a map.

use std::fmt;
use std::time::Duration;

use serde::de::value::SeqAccessDeserializer;
use serde::de::{self, Deserialize, Deserializer, MapAccess, SeqAccess, Visitor, value::MapAccessDeserializer};

use super::TlsVersion;
use super::file::{BalanceMap, BalanceWord, CheckMap, CheckWord, ServerMap, TlsMap, TlsWord};
use super::routes::{CacheMap, HashMap};

/// `10s`, `2m`, `1h 30m`; `off` where the key allows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DurationText(pub(super) Option<Duration>);

impl<'de> Deserialize<'de> for DurationText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Words;
        impl Visitor<'_> for Words {
            type Value = DurationText;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a duration with its unit, like 10s or 30m")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<DurationText, E> {
                if text == "off" {
                    return Ok(DurationText(None));
                }
                let duration = humantime::parse_duration(text);
                duration
                    .map(|duration| DurationText(Some(duration)))
                    .map_err(|_| E::invalid_type(de::Unexpected::Str(text), &self))
            }
        }
        deserializer.deserialize_any(Words)
    }
}

/// `"1.2"` or `"1.3"`; without quotes YAML takes them for numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TlsVersionWord(pub(super) TlsVersion);

impl<'de> Deserialize<'de> for TlsVersionWord {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Words;
        impl Visitor<'_> for Words {
            type Value = TlsVersionWord;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a version of TLS, \"1.2\" or \"1.3\"")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<TlsVersionWord, E> {
                version(text).ok_or_else(|| E::invalid_type(de::Unexpected::Str(text), &self))
            }

            fn visit_f64<E: de::Error>(self, number: f64) -> Result<TlsVersionWord, E> {
                version(&number.to_string()).ok_or_else(|| E::invalid_type(de::Unexpected::Float(number), &self))
            }
        }
        fn version(text: &str) -> Option<TlsVersionWord> {
            match text {
                "1.2" => Some(TlsVersionWord(TlsVersion::Tls12)),
                "1.3" => Some(TlsVersionWord(TlsVersion::Tls13)),
                _ => None,
            }
        }
        deserializer.deserialize_any(Words)
    }
}

/// A number of bytes, or `64KiB`, `1MiB`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Size(pub(super) usize);

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Words;
        impl Visitor<'_> for Words {
            type Value = Size;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a size, like 64KiB, or a number of bytes")
            }

            fn visit_u64<E: de::Error>(self, bytes: u64) -> Result<Size, E> {
                usize::try_from(bytes).map(Size).map_err(|_| E::invalid_type(de::Unexpected::Unsigned(bytes), &self))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Size, E> {
                let units = [("KiB", 1 << 10), ("MiB", 1 << 20), ("B", 1)];
                let with_unit = units.iter().find_map(|(unit, factor)| Some((text.strip_suffix(unit)?, *factor)));
                let (number, factor) = with_unit.unwrap_or((text, 1));
                let size = number.trim().parse::<usize>().ok().and_then(|number| number.checked_mul(factor));
                size.map(Size).ok_or_else(|| E::invalid_type(de::Unexpected::Str(text), &self))
            }
        }
        deserializer.deserialize_any(Words)
    }
}

/// `off`, or a number.
#[derive(Debug, Clone, Copy)]
pub(super) struct OptionalCount(pub(super) Option<i64>);

impl<'de> Deserialize<'de> for OptionalCount {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;
        impl Visitor<'_> for Either {
            type Value = OptionalCount;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("off or a number")
            }

            fn visit_i64<E>(self, number: i64) -> Result<OptionalCount, E> {
                Ok(OptionalCount(Some(number)))
            }

            fn visit_u64<E>(self, number: u64) -> Result<OptionalCount, E> {
                Ok(OptionalCount(Some(i64::try_from(number).unwrap_or(i64::MAX))))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<OptionalCount, E> {
                if text == "off" {
                    Ok(OptionalCount(None))
                } else {
                    Err(E::invalid_type(de::Unexpected::Str(text), &self))
                }
            }
        }
        deserializer.deserialize_any(Either)
    }
}

/// `off`, or events in a time: `60/1m`.
#[derive(Debug, Clone, Copy)]
pub(super) struct RateText(pub(super) Option<(u32, Duration)>);

impl<'de> Deserialize<'de> for RateText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Words;
        impl Visitor<'_> for Words {
            type Value = RateText;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("off or a rate, like 60/1m")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<RateText, E> {
                if text == "off" {
                    return Ok(RateText(None));
                }
                let rate = text.split_once('/').and_then(|(events, per)| {
                    let digits = events.bytes().all(|byte| byte.is_ascii_digit());
                    let events = events.parse().ok().filter(|_| digits)?;
                    Some((events, humantime::parse_duration(per).ok()?))
                });
                rate.map(|rate| RateText(Some(rate))).ok_or_else(|| E::invalid_type(de::Unexpected::Str(text), &self))
            }
        }
        deserializer.deserialize_any(Words)
    }
}

/// `"host:port"`, or a map.
#[derive(Debug)]
pub(super) enum ServerEntry {
    Word(String),
    Map(ServerMap),
}

impl<'de> Deserialize<'de> for ServerEntry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = ServerEntry;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("\"host:port\", {address: \"host:port\", weight: 2} or {srv: _imap._tcp.example.org}")
            }

            fn visit_str<E>(self, text: &str) -> Result<ServerEntry, E> {
                Ok(ServerEntry::Word(text.to_owned()))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<ServerEntry, A::Error> {
                ServerMap::deserialize(MapAccessDeserializer::new(map)).map(ServerEntry::Map)
            }
        }
        deserializer.deserialize_any(Either)
    }
}

/// `none`, `starttls`, `implicit`, or a map.
#[derive(Debug)]
pub(super) enum TlsEntry {
    Word(TlsWord),
    Map(TlsMap),
}

impl<'de> Deserialize<'de> for TlsEntry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = TlsEntry;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("none, starttls, implicit, or a map with mode and ca, server_name, pin or insecure")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<TlsEntry, E> {
                TlsWord::deserialize(de::value::StrDeserializer::<E>::new(text)).map(TlsEntry::Word)
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<TlsEntry, A::Error> {
                TlsMap::deserialize(MapAccessDeserializer::new(map)).map(TlsEntry::Map)
            }
        }
        deserializer.deserialize_any(Either)
    }
}

/// `off`, a kind of check, or a map.
#[derive(Debug)]
pub(super) enum CheckEntry {
    Off,
    Word(CheckWord),
    Map(CheckMap),
}

impl<'de> Deserialize<'de> for CheckEntry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = CheckEntry;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("off, tcp, tls, imap, login, or a map with kind and interval, timeout, rise or fall")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<CheckEntry, E> {
                if text == "off" {
                    return Ok(CheckEntry::Off);
                }
                CheckWord::deserialize(de::value::StrDeserializer::<E>::new(text)).map(CheckEntry::Word)
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<CheckEntry, A::Error> {
                CheckMap::deserialize(MapAccessDeserializer::new(map)).map(CheckEntry::Map)
            }
        }
        deserializer.deserialize_any(Either)
    }
}

/// A kind of balance, or a map.
#[derive(Debug)]
pub(super) enum BalanceEntry {
    Word(BalanceWord),
    Map(BalanceMap),
}

impl<'de> Deserialize<'de> for BalanceEntry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = BalanceEntry;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("user-hash, bounded-hash, least-sessions, round-robin, or a map with kind and factor")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<BalanceEntry, E> {
                BalanceWord::deserialize(de::value::StrDeserializer::<E>::new(text)).map(BalanceEntry::Word)
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<BalanceEntry, A::Error> {
                BalanceMap::deserialize(MapAccessDeserializer::new(map)).map(BalanceEntry::Map)
            }
        }
        deserializer.deserialize_any(Either)
    }
}

/// `off`, or a map.
#[derive(Debug)]
pub(super) enum CacheEntry {
    Off,
    Map(CacheMap),
}

impl<'de> Deserialize<'de> for CacheEntry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = CacheEntry;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("off, or a map with ttl, negative, stale, entries or file")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<CacheEntry, E> {
                if text == "off" { Ok(CacheEntry::Off) } else { Err(E::invalid_type(de::Unexpected::Str(text), &self)) }
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<CacheEntry, A::Error> {
                CacheMap::deserialize(MapAccessDeserializer::new(map)).map(CacheEntry::Map)
            }
        }
        deserializer.deserialize_any(Either)
    }
}

/// A list of backends, or a map.
#[derive(Debug)]
pub(super) enum HashEntry {
    List(Vec<String>),
    Map(HashMap),
}

impl<'de> Deserialize<'de> for HashEntry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = HashEntry;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of backends, or a map with backends and style")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<HashEntry, A::Error> {
                Vec::deserialize(SeqAccessDeserializer::new(list)).map(HashEntry::List)
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<HashEntry, A::Error> {
                HashMap::deserialize(MapAccessDeserializer::new(map)).map(HashEntry::Map)
            }
        }
        deserializer.deserialize_any(Either)
    }
}

/// One word or a list of words.
#[derive(Debug)]
pub(super) struct Words {
    pub(super) words: Vec<String>,
    /// How they are written, which their places depend on.
    pub(super) is_list: bool,
}

impl<'de> Deserialize<'de> for Words {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = Words;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a word or a list of words")
            }

            fn visit_str<E>(self, text: &str) -> Result<Words, E> {
                Ok(Words { words: vec![text.to_owned()], is_list: false })
            }

            fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Words, A::Error> {
                let words = Vec::deserialize(SeqAccessDeserializer::new(list))?;
                Ok(Words { words, is_list: true })
            }
        }
        deserializer.deserialize_any(Either)
    }
}
