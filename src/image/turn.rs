//! Cameras write pixels as the sensor has them and say how to hold the picture. Separate because
//! it is the one thing that moves pixels without changing any.

use super::{ImageSize, Picture};

/// EXIF's orientation: how pixels are turned to be looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Orientation(u8);

impl Orientation {
    /// EXIF's number; none, or one that means nothing, is upright.
    pub fn new(number: Option<u8>) -> Self {
        Self(number.filter(|number| (1..=8).contains(number)).unwrap_or(1))
    }

    fn swaps_sides(self) -> bool {
        self.0 >= 5
    }

    /// The size of what is turned.
    pub fn size(self, ImageSize { height, width }: ImageSize) -> ImageSize {
        match self.swaps_sides() {
            true => ImageSize { height: width, width: height },
            false => ImageSize { height, width },
        }
    }

    /// Pillow's `exif_transpose`.
    pub fn turn(self, picture: Picture) -> Picture {
        if self.0 == 1 {
            return picture;
        }
        let ImageSize { height, width } = picture.size;
        let size = self.size(picture.size);
        // Where a pixel comes from, before sides are swapped: from the other end, or not.
        let (from_bottom, from_right) = match self.0 {
            2 => (false, true),
            3 => (true, true),
            4 => (true, false),
            6 => (true, false),
            7 => (true, true),
            8 => (false, true),
            _ => (false, false),
        };
        let mut rgb = Vec::with_capacity(picture.rgb.len());
        for y in 0..size.height {
            for x in 0..size.width {
                let (row, column) = if self.swaps_sides() { (x, y) } else { (y, x) };
                let row = if from_bottom { height - 1 - row } else { row };
                let column = if from_right { width - 1 - column } else { column };
                let at = 3 * (row * width + column);
                rgb.extend_from_slice(&picture.rgb[at..at + 3]);
            }
        }
        Picture { size, rgb }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_number_is_the_turn_that_pillow_makes() {
        // 1 2 3
        // 4 5 6
        let rgb = (1..=6).flat_map(|value| [value; 3]).collect();
        let picture = Picture::new(ImageSize { height: 2, width: 3 }, rgb).unwrap();
        for (number, width, expected) in [
            (None, 3, [1, 2, 3, 4, 5, 6]),
            (Some(1), 3, [1, 2, 3, 4, 5, 6]),
            (Some(2), 3, [3, 2, 1, 6, 5, 4]),
            (Some(3), 3, [6, 5, 4, 3, 2, 1]),
            (Some(4), 3, [4, 5, 6, 1, 2, 3]),
            (Some(5), 2, [1, 4, 2, 5, 3, 6]),
            (Some(6), 2, [4, 1, 5, 2, 6, 3]),
            (Some(7), 2, [6, 3, 5, 2, 4, 1]),
            (Some(8), 2, [3, 6, 2, 5, 1, 4]),
            (Some(9), 3, [1, 2, 3, 4, 5, 6]),
        ] {
            let turned = Orientation::new(number).turn(picture.clone());
            assert_eq!(turned.size().width, width, "{number:?}");
            let (pixels, _) = turned.rgb().as_chunks::<3>();
            let found: Vec<u8> = pixels.iter().map(|pixel| pixel[0]).collect();
            assert_eq!(found, expected, "{number:?}");
        }
    }
}
