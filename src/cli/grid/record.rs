//! What a sheet says of itself: the settings of its first picture, and of each what differs and
//! where it lies. Separate because `info` reads it, perhaps a stranger's, and nobody makes a sheet
//! of it again.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::axes::Axis;
use super::sheet::Point;
use crate::cli::info::{line, record_lines};
use crate::cli::settings::{MAX_RECORD_BYTES, SCHEMA_VERSION, Settings};
use crate::error::{Error, Result};

/// The record of a sheet.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(in crate::cli) struct GridRecord {
    /// As that of [`Settings`].
    schema: u32,
    /// Who wrote it.
    version: String,
    /// The first goes to the right, the second one down.
    grid: Vec<Axis>,
    /// Of the first cell.
    settings: Settings,
    /// Row by row.
    cells: Vec<Cell>,
}

/// One picture.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Cell {
    /// Pixels from the sheet's left edge.
    x: u64,
    /// Pixels from its upper edge.
    y: u64,
    /// The fields in which its settings differ from the first cell's.
    differs: Map<String, Value>,
    /// [`Settings::key`].
    key: String,
}

/// Settings as the fields of JSON.
fn fields(settings: &Settings) -> Map<String, Value> {
    match serde_json::to_value(settings) {
        Ok(Value::Object(fields)) => fields,
        // It is a struct of texts and finite numbers.
        Ok(_) | Err(_) => Map::new(),
    }
}

impl GridRecord {
    /// Of a sheet's cells and their places.
    ///
    /// # Errors
    /// If there are none.
    pub fn new(axes: &[Axis], cells: &[(Settings, Point)]) -> Result<Self> {
        let [(settings, _), ..] = cells else { return Err(Error::other("a grid of nothing")) };
        let first = fields(settings);
        let cell = |(settings, Point { x, y }): &(Settings, Point)| {
            let own = fields(settings);
            let none = first.keys().filter(|name| !own.contains_key(*name));
            let none: Vec<_> = none.map(|name| (name.clone(), Value::Null)).collect();
            let differs =
                own.into_iter().filter(|(name, value)| first.get(name) != Some(value)).chain(none);
            let (x, y) = (*x as u64, *y as u64);
            Cell { x, y, differs: differs.collect(), key: settings.key() }
        };
        Ok(Self {
            schema: SCHEMA_VERSION,
            version: env!("CARGO_PKG_VERSION").into(),
            grid: axes.to_vec(),
            settings: settings.clone(),
            cells: cells.iter().map(cell).collect(),
        })
    }

    /// Version of the fields of who wrote it.
    pub fn schema(&self) -> u32 {
        self.schema
    }

    /// What determines the sheet, as [`Settings::key`] is of a picture.
    pub fn key(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        for cell in &self.cells {
            hasher.update(cell.key.as_bytes());
        }
        hasher.finalize().to_hex().to_string()
    }

    /// The record as one line of JSON.
    ///
    /// # Errors
    /// If it is longer than what is read.
    pub fn to_json(&self) -> Result<String> {
        let json = serde_json::to_string(self).unwrap_or_default();
        match json.len() {
            ..=MAX_RECORD_BYTES => Ok(json),
            bytes => Err(Error::other(format!(
                "--grid: its record has {bytes} bytes, more than {MAX_RECORD_BYTES}"
            ))),
        }
    }

    /// The record of a sheet, if a text is one.
    pub fn read(text: &str) -> Option<Self> {
        let text = Some(text).filter(|text| text.len() <= MAX_RECORD_BYTES)?;
        serde_json::from_str(text).ok()
    }

    /// Why it is not the record of one picture.
    pub fn refusal(&self) -> Error {
        Error::usage(format!(
            "it is a grid of {} pictures, whose settings tiny-sd info shows; give those of one as \
             flags",
            self.cells.len()
        ))
    }

    /// What it says, for people.
    pub fn say(&self, text: &mut String) {
        for (axis, way) in self.grid.iter().zip(["across", "down"]) {
            line(text, way, format!("{} {}", axis.name, axis.values.join(", ")));
        }
        record_lines(&self.settings, text);
        for (number, Cell { x, y, differs, key }) in (1_u64..).zip(&self.cells) {
            let differs = differs.iter().map(|(name, value)| format!("{name} {value}"));
            let differs = differs.collect::<Vec<_>>().join(", ");
            let differs = if differs.is_empty() { "as above" } else { &differs };
            line(text, &format!("cell {number}"), format!("at {x},{y}: {differs}, key {key}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::settings::tests::settings;

    fn record() -> GridRecord {
        let axes: Vec<Axis> = vec!["steps=3,4".parse().unwrap(), "seed=5,6".parse().unwrap()];
        let cell = |steps, seed, x, y| (Settings { steps, seed, ..settings() }, Point { x, y });
        let strength = Settings { strength: Some(0.5), ..settings() };
        let mut cells = vec![cell(3, 5, 10, 20), cell(4, 5, 90, 20), cell(3, 6, 10, 90)];
        cells.push((strength, Point { x: 90, y: 90 }));
        GridRecord::new(&axes, &cells).unwrap()
    }

    #[test]
    fn a_sheets_record_comes_back_and_says_what_differs_and_where() {
        let record = record();
        let json = record.to_json().unwrap();
        assert_eq!(GridRecord::read(&json), Some(record.clone()));
        let newer = json.replacen("\"schema\":1", "\"schema\":2", 1);
        assert_eq!(GridRecord::read(&newer).map(|record| record.schema()), Some(2));
        let mut text = String::new();
        record.say(&mut text);
        for expected in [
            "across           steps 3, 4\n",
            "down             seed 5, 6\n",
            "prompt           a fox\n",
            "cell 1           at 10,20: as above, key ",
            "cell 2           at 90,20: steps 4, key ",
            "cell 3           at 10,90: seed 6, key ",
            "strength 0.5, key ",
        ] {
            assert!(text.contains(expected), "{expected:?}: {text}");
        }
    }

    #[test]
    fn the_record_of_a_sheet_is_none_of_a_picture_and_the_other_way_round() {
        let error = Settings::from_json(&record().to_json().unwrap()).unwrap_err();
        assert!(error.to_string().starts_with("it is a grid of 4 pictures, whose settings"));
        assert_eq!(error.kind(), crate::error::Kind::Usage);
        for text in [&*settings().to_json(), "", "[]", "{\"grid\":[]}"] {
            assert_eq!(GridRecord::read(text), None, "{text}");
        }
        assert!(GridRecord::new(&[], &[]).is_err());
    }
}
