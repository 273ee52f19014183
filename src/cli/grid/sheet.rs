//! The sheet of a grid: where its cells and labels are, and how they are drawn. Separate because
//! it is arithmetic on sizes and pixels: its size is known, and refused, before a model is loaded.

use super::axes::Axis;
use super::font;
use crate::error::{Error, Result};
use crate::image::{FileFormat, ImageSize, MAX_PICTURE_PIXELS, Picture};

/// Most lines of a column's label; what is longer ends in dots.
const MAX_COLUMN_LINES: usize = 4;
/// Rows of pixels from one line to the next, before letters are enlarged.
const LINE_HEIGHT: usize = font::HEIGHT + 2;
/// Pixels around cells and labels, before letters are enlarged.
const PADDING: usize = 4;
/// A cell's shorter side for each enlargement of the letters.
const PIXELS_A_SCALE: usize = 256;
const PAPER: u8 = 255;
const INK: u8 = 0;

/// Where everything is on a sheet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Sheet {
    cell: ImageSize,
    /// Pixels of a letter's pixel.
    scale: usize,
    /// Pixels of the labels on the left and at the top.
    left: usize,
    top: usize,
    /// The lines of the labels.
    columns: Vec<Vec<String>>,
    rows: Vec<Vec<String>>,
    /// Of the whole sheet.
    size: ImageSize,
}

/// A point of a sheet, in pixels from its upper left corner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::cli) struct Point {
    pub x: usize,
    pub y: usize,
}

impl Sheet {
    /// Of cells of one size: the first axis goes to the right, the second one down.
    ///
    /// # Errors
    /// If it has more pixels than are read back, or longer sides than its kind of file.
    pub fn new(cell: ImageSize, axes: &[Axis], format: FileFormat) -> Result<Self> {
        let scale = (cell.height.min(cell.width) / PIXELS_A_SCALE).clamp(1, 8);
        let (advance, line) = (scale * font::ADVANCE, scale * LINE_HEIGHT);
        let padding = scale * PADDING;
        let labels = |axis: Option<&Axis>| -> Vec<String> {
            let label = |axis: &Axis| axis.values.iter().map(|value| axis.label(value)).collect();
            axis.map_or_else(Vec::new, label)
        };
        let letters = |pixels: usize| (pixels / advance).max(1);
        let wrap = |labels: Vec<String>, letters: usize, lines: usize| -> Vec<Vec<String>> {
            labels.iter().map(|label| wrapped(label, letters, lines)).collect()
        };
        let columns = wrap(labels(axes.first()), letters(cell.width), MAX_COLUMN_LINES);
        let most_rows = (cell.height / line).max(1);
        let rows = wrap(labels(axes.get(1)), letters(cell.width / 4 * 3), most_rows);
        let longest = rows.iter().flatten().map(|line| line.chars().count()).max();
        let left = longest.map_or(0, |letters| letters * advance + padding);
        let top = columns.iter().map(Vec::len).max().unwrap_or(0) * line + padding;
        let along = |count: usize, side: usize| count.saturating_mul(side.saturating_add(padding));
        let size = ImageSize {
            height: along(rows.len().max(1), cell.height).saturating_add(top + padding),
            width: along(columns.len().max(1), cell.width).saturating_add(left + padding),
        };
        let sheet = Self { cell, scale, left, top, columns, rows, size };
        sheet.check(format)?;
        Ok(sheet)
    }

    fn check(&self, format: FileFormat) -> Result<()> {
        let Self { size, cell, columns, rows, .. } = self;
        let (columns, rows) = (columns.len(), rows.len().max(1));
        let of =
            format!("--grid: a sheet of {columns}x{rows} pictures of {cell} has {size} pixels");
        let longest = format.longest_side();
        if size.height.saturating_mul(size.width) > MAX_PICTURE_PIXELS {
            return Err(Error::usage(format!(
                "{of}, more than {MAX_PICTURE_PIXELS}: fewer values, or less --width and --height"
            )));
        }
        if size.height > longest || size.width > longest {
            let name = format.name();
            return Err(Error::usage(format!("{of}, and a {name}'s sides end at {longest}")));
        }
        Ok(())
    }

    /// Of the whole sheet.
    pub fn size(&self) -> ImageSize {
        self.size
    }

    /// The upper left corner of a cell; cells are counted from 0, row by row.
    pub fn place(&self, cell: usize) -> Point {
        let columns = self.columns.len().max(1);
        let padding = self.scale * PADDING;
        Point {
            x: self.left + padding + cell % columns * (self.cell.width + padding),
            y: self.top + padding + cell / columns * (self.cell.height + padding),
        }
    }

    /// The sheet with its pictures.
    ///
    /// # Errors
    /// If one has another size.
    pub fn draw(&self, pictures: &[Picture]) -> Result<Picture> {
        let ImageSize { height, width } = self.size;
        let mut paper = Paper { rgb: vec![PAPER; height * width * 3], width };
        for (cell, picture) in pictures.iter().enumerate() {
            if picture.size() != self.cell {
                let (found, cell) = (picture.size(), self.cell);
                return Err(Error::other(format!("a picture of {found} in a grid of {cell}")));
            }
            paper.copy(picture, self.place(cell));
        }
        let (advance, line) = (self.scale * font::ADVANCE, self.scale * LINE_HEIGHT);
        let long = |text: &str| text.chars().count() * advance;
        for (column, lines) in self.columns.iter().enumerate() {
            let middle = self.place(column).x + self.cell.width / 2;
            let first = self.top - lines.len() * line;
            for (number, text) in lines.iter().enumerate() {
                let x = middle.saturating_sub(long(text) / 2);
                paper.write(text, Point { x, y: first + number * line }, self.scale);
            }
        }
        for (row, lines) in self.rows.iter().enumerate() {
            let middle = self.place(row * self.columns.len().max(1)).y + self.cell.height / 2;
            let first = middle.saturating_sub(lines.len() * line / 2);
            for (number, text) in lines.iter().enumerate() {
                let x = self.left - long(text);
                paper.write(text, Point { x, y: first + number * line }, self.scale);
            }
        }
        Picture::new(self.size, paper.rgb)
    }
}

/// A text in lines of so many letters at most, broken at spaces where there are some.
fn wrapped(text: &str, letters: usize, most_lines: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    let mut used = 0;
    for word in text.split_whitespace() {
        let len = word.chars().count();
        if used > 0 && used + 1 + len > letters {
            lines.push(String::new());
            used = 0;
        }
        let gap = (used > 0).then_some(' ');
        for letter in gap.into_iter().chain(word.chars()) {
            if used == letters {
                lines.push(String::new());
                used = 0;
            }
            if let Some(line) = lines.last_mut() {
                line.push(letter);
                used += 1;
            }
        }
    }
    if lines.len() > most_lines {
        lines.truncate(most_lines);
        if let Some(line) = lines.last_mut() {
            let kept: String = line.chars().take(letters.saturating_sub(3)).collect();
            *line = format!("{kept}...").chars().take(letters).collect();
        }
    }
    lines
}

/// Pixels that are drawn on.
struct Paper {
    rgb: Vec<u8>,
    width: usize,
}

impl Paper {
    fn copy(&mut self, picture: &Picture, Point { x, y }: Point) {
        let row_bytes = picture.size().width * 3;
        for (row, pixels) in picture.rgb().chunks(row_bytes).enumerate() {
            let at = ((y + row) * self.width + x) * 3;
            if let Some(place) = self.rgb.get_mut(at..at + row_bytes) {
                place.copy_from_slice(pixels);
            }
        }
    }

    fn write(&mut self, text: &str, Point { x, y }: Point, scale: usize) {
        for (number, letter) in text.chars().enumerate() {
            let left = x + number * font::ADVANCE * scale;
            for row in 0..font::HEIGHT * scale {
                for column in 0..font::ADVANCE * scale {
                    if font::is_set(letter, column / scale, row / scale) {
                        let at = ((y + row) * self.width + left + column) * 3;
                        self.rgb.get_mut(at..at + 3).into_iter().for_each(|rgb| rgb.fill(INK));
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CELL: ImageSize = ImageSize { height: 24, width: 64 };

    fn axes(texts: &[&str]) -> Vec<Axis> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    /// The ink of a sheet's part, as rows of text.
    fn ink(sheet: &Picture, from: Point, size: ImageSize) -> Vec<String> {
        let pixel = |x: usize, y: usize| {
            let at = (y * sheet.size().width + x) * 3;
            if sheet.rgb()[at..at + 3] == [INK; 3] { '#' } else { '.' }
        };
        let row = |y| (from.x..from.x + size.width).map(|x| pixel(x, y)).collect();
        (from.y..from.y + size.height).map(row).collect()
    }

    #[test]
    fn cells_lie_in_rows_untouched_and_labels_at_the_edges() {
        let sheet = Sheet::new(CELL, &axes(&["seed=1-3", "steps=4,5"]), FileFormat::Png).unwrap();
        let picture = |grey: u8| Picture::new(CELL, vec![grey; 24 * 64 * 3]).unwrap();
        let pictures: Vec<_> = (0..6).map(|cell| picture(100 + cell)).collect();
        let drawn = sheet.draw(&pictures).unwrap();
        assert_eq!(drawn.size(), sheet.size());
        for cell in 0..6 {
            let Point { x, y } = sheet.place(cell);
            for row in y..y + CELL.height {
                let at = (row * drawn.size().width + x) * 3;
                assert_eq!(drawn.rgb()[at..at + 64 * 3], vec![100 + cell as u8; 64 * 3][..]);
            }
        }
        let colours = |grey: u8| drawn.rgb().iter().filter(|value| **value == grey).count();
        assert_eq!(colours(105), 24 * 64 * 3);
        // `steps: 5` in one line of eight letters, in the middle of its row.
        let (x, y) = (PADDING, sheet.place(3).y + 12 - 5);
        let size = ImageSize { height: font::HEIGHT, width: 8 * font::ADVANCE };
        let found = ink(&drawn, Point { x, y }, size);
        let letter = |number: usize, row: usize| -> String {
            let letter = "steps: 5".chars().nth(number).unwrap();
            let pixel = |x| if font::is_set(letter, x, row) { '#' } else { '.' };
            (0..font::ADVANCE).map(pixel).collect()
        };
        for (row, found) in found.iter().enumerate() {
            let expected: String = (0..8).map(|number| letter(number, row)).collect();
            assert_eq!(*found, expected);
        }
        assert!(
            sheet
                .draw(&[Picture::new(ImageSize { height: 1, width: 1 }, vec![0; 3]).unwrap()])
                .is_err()
        );
    }

    #[test]
    fn long_labels_are_broken_and_cut_and_letters_grow_with_the_cells() {
        assert_eq!(wrapped("guidance-scale: 7.5", 9, 4), ["guidance-", "scale:", "7.5"]);
        assert_eq!(wrapped("guidance-scale: 7.5", 20, 4), ["guidance-scale: 7.5"]);
        assert_eq!(wrapped("a b c d e f", 3, 2), ["a b", "..."]);
        assert_eq!(wrapped("", 3, 2), [""]);
        let large = ImageSize { height: 512, width: 768 };
        let one = Sheet::new(large, &axes(&["seed=1,2"]), FileFormat::Png).unwrap();
        assert_eq!((one.scale, one.left), (2, 0));
        assert_eq!(one.size().to_string(), "1560x556");
    }

    #[test]
    fn a_sheet_that_nobody_could_read_is_refused_with_its_numbers() {
        let cell = ImageSize { height: 2048, width: 2048 };
        let grid = axes(&["seed=1-5", "steps=1-5"]);
        let error = Sheet::new(cell, &grid, FileFormat::Png).unwrap_err().to_string();
        assert!(error.contains("a sheet of 5x5 pictures of 2048x2048 has 1"), "{error}");
        assert!(error.contains("pixels, more than 67108864: fewer values"), "{error}");
        let cell = ImageSize { height: 64, width: 1024 };
        let grid = axes(&["seed=1-17"]);
        let error = Sheet::new(cell, &grid, FileFormat::WebP).unwrap_err().to_string();
        assert!(error.ends_with("and a WebP's sides end at 16384"), "{error}");
        Sheet::new(cell, &grid, FileFormat::Jpeg).unwrap();
    }
}
