//! The letters of a grid's labels: a bitmap font of printable ASCII, five pixels wide. Separate
//! because it is data: a sheet's labels look the same on every machine, without a font file.

/// Pixels from one letter to the next.
pub(super) const ADVANCE: usize = 6;
/// Rows of a letter, the last of which is below the line.
pub(super) const HEIGHT: usize = 8;

/// From the space to the tilde: a byte is a row, from the top, its lowest five bits the pixels.
const GLYPHS: [u64; 95] = [
    0x00000000_00000000,
    0x04040404_00000400,
    0x0a0a0a00_00000000,
    0x0a0a1f0a_1f0a0a00,
    0x040f140e_051e0400,
    0x18190204_08130300,
    0x0c121408_15120d00,
    0x04040800_00000000,
    0x02040808_08040200,
    0x08040202_02040800,
    0x0004150e_15040000,
    0x0004041f_04040000,
    0x00000000_000c0408,
    0x0000001f_00000000,
    0x00000000_000c0c00,
    0x00010204_08100000,
    0x0e111315_19110e00,
    0x040c0404_04040e00,
    0x0e110102_04081f00,
    0x1f020402_01110e00,
    0x02060a12_1f020200,
    0x1f101e01_01110e00,
    0x0608101e_11110e00,
    0x1f010204_08080800,
    0x0e11110e_11110e00,
    0x0e11110f_01020c00,
    0x000c0c00_0c0c0000,
    0x000c0c00_0c040800,
    0x02040810_08040200,
    0x00001f00_1f000000,
    0x08040201_02040800,
    0x0e110102_04000400,
    0x0e11010d_15150e00,
    0x0e111111_1f111100,
    0x1e11111e_11111e00,
    0x0e111010_10110e00,
    0x1c121111_11121c00,
    0x1f10101e_10101f00,
    0x1f10101e_10101000,
    0x0e111017_11110f00,
    0x1111111f_11111100,
    0x0e040404_04040e00,
    0x07020202_02120c00,
    0x11121418_14121100,
    0x10101010_10101f00,
    0x111b1515_11111100,
    0x11111915_13111100,
    0x0e111111_11110e00,
    0x1e11111e_10101000,
    0x0e111111_15120d00,
    0x1e11111e_14121100,
    0x0f10100e_01011e00,
    0x1f040404_04040400,
    0x11111111_11110e00,
    0x11111111_110a0400,
    0x11111115_15150a00,
    0x11110a04_0a111100,
    0x1111110a_04040400,
    0x1f010204_08101f00,
    0x0e080808_08080e00,
    0x00100804_02010000,
    0x0e020202_02020e00,
    0x040a1100_00000000,
    0x00000000_00001f00,
    0x08040200_00000000,
    0x00000e01_0f110f00,
    0x10101619_11111e00,
    0x00000e10_10110e00,
    0x01010d13_11110f00,
    0x00000e11_1f100e00,
    0x0609081c_08080800,
    0x00000f11_110f010e,
    0x10101619_11111100,
    0x04000c04_04040e00,
    0x02000602_0202120c,
    0x10101214_18141200,
    0x0c040404_04040e00,
    0x00001a15_15111100,
    0x00001619_11111100,
    0x00000e11_11110e00,
    0x00001e11_111e1010,
    0x00000f11_110f0101,
    0x00001619_10101000,
    0x00000e10_0e011e00,
    0x08081c08_08090600,
    0x00001111_11130d00,
    0x00001111_110a0400,
    0x00001111_15150a00,
    0x0000110a_040a1100,
    0x00001111_110f010e,
    0x00001f02_04081f00,
    0x02040408_04040200,
    0x04040404_04040400,
    0x08040402_04040800,
    0x00000815_02000000,
];
/// What has no letter here: an empty box.
const OTHER: u64 = 0x1f11_1111_1111_1f00;

/// Whether a pixel of a letter is set; `x` counts from the left, `y` from the top.
pub(super) fn is_set(letter: char, x: usize, y: usize) -> bool {
    let place = (letter as usize).checked_sub(' ' as usize);
    let glyph = place.and_then(|place| GLYPHS.get(place)).unwrap_or(&OTHER);
    let row = glyph.to_be_bytes().get(y).copied().unwrap_or_default();
    x < ADVANCE - 1 && row >> (ADVANCE - 2 - x) & 1 == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(letter: char) -> Vec<String> {
        let pixel = |x, y| if is_set(letter, x, y) { '#' } else { '.' };
        (0..HEIGHT).map(|y| (0..ADVANCE).map(|x| pixel(x, y)).collect()).collect()
    }

    #[test]
    fn letters_stand_upright_and_differ_from_each_other() {
        let expected =
            ["####..", "#...#.", "#...#.", "####..", "#.....", "#.....", "#.....", "......"];
        assert_eq!(rows('P'), expected);
        assert_eq!(rows('é'), rows('東'));
        let mut seen: Vec<_> = (' '..='~').chain(['é']).map(rows).collect();
        seen.sort();
        seen.dedup();
        assert_eq!(seen.len(), 96);
    }
}
