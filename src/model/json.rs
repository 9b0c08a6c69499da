//! Reading of the registry's JSON documents: single members of an object, the rest ignored without
//! being kept in memory. Pure.

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::model::excerpt::Excerpt;

/// Reads the JSON object `json`. `T` should have an `Option<&RawValue>` for each member that is used,
/// so that one with a value of an unexpected type concerns that member alone.
///
/// # Errors
/// `json` is not a JSON object.
pub(crate) fn object<'j, T: Deserialize<'j>>(json: &'j [u8]) -> Result<T, String> {
    // serde would take an array for the members of `T` in their order.
    match json.trim_ascii_start().first() {
        None | Some(b'{') => serde_json::from_slice(json).map_err(|error| error.to_string()),
        Some(_) => Err("not a JSON object".to_owned()),
    }
}

/// The value of a member, if it is there and not null.
///
/// # Errors
/// It is not a `T`. Names `key` and the value, shortened.
pub(crate) fn member<'j, T: Deserialize<'j>>(
    key: &str,
    value: Option<&'j RawValue>,
) -> Result<Option<T>, String> {
    let Some(value) = value else { return Ok(None) };
    serde_json::from_str(value.get()).map(Some).map_err(|_| wrong(key, value.get()))
}

/// Says that the value of `key` cannot be used.
pub(crate) fn wrong(key: &str, value: &str) -> String {
    format!("{key} is {}", Excerpt::new(value.as_bytes()))
}
