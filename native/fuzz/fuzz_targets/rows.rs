//! Any bytes and any numbers: nothing panics, and what is accepted stays in its buffer (the address sanitizer watches).
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use siderolink_native::cipher::{self, Key};
use siderolink_native::frames::{self, Offloads};
use siderolink_native::layout::{Margins, Rows};
use siderolink_native::many;
use siderolink_native::split::split;

#[derive(Arbitrary, Debug)]
struct Case<'a> {
    size: u16,
    start: u16,
    stride: u16,
    lengths: (u16, u16),
    count: u8,
    mtu: u16,
    at: u16,
    wanted: u16,
    margins: (u8, u8),
    good: Option<Vec<bool>>,
    places: Vec<(u16, u16)>,
    frame: &'a [u8],
}

fuzz_target!(|case: Case<'_>| {
    let lengths = (usize::from(case.lengths.0), usize::from(case.lengths.1));
    let margins = Margins {
        before: usize::from(case.margins.0),
        after: usize::from(case.margins.1),
    };
    let mut buffer = vec![0; usize::from(case.size)];
    let (start, stride, count) = (usize::from(case.start), usize::from(case.stride), usize::from(case.count));
    let _ = split(
        case.frame,
        usize::from(case.mtu),
        &mut buffer,
        usize::from(case.at),
        margins,
        usize::from(case.wanted),
    );
    for (byte, given) in buffer.iter_mut().zip(case.frame) {
        *byte ^= given;
    }
    if let Ok(rows) = Rows::new(buffer.len(), start, stride, lengths, count, frames::AROUND) {
        let good = case.good.filter(|good| good.len() == rows.count());
        let found = frames::find(&mut buffer, &rows, good.as_deref(), Offloads { tso: true, uso: true });
        assert!(found.iter().all(|frame| frame.start < frame.end && frame.end <= buffer.len()));
    }
    if let Ok(rows) = Rows::new(buffer.len(), start, stride, lengths, count, cipher::AROUND) {
        let key = Key::new(&[1; 32]).unwrap();
        let before = buffer.clone();
        cipher::seal(&key, &mut buffer, &rows, 1, 2).unwrap();
        let opened = cipher::open(&key, &mut buffer, &rows);
        assert!(opened.good.iter().all(|&good| good));
        for row in 0..rows.count() {
            assert_eq!(before[rows.text(row)], buffer[rows.text(row)]);
        }
    }
    let rows = |_: ()| case.places.iter().map(|&(start, size)| many::Row {
        key: Key::new(&[1; 32]).unwrap(),
        text: usize::from(start)..usize::from(start) + usize::from(size),
    });
    if let Ok(found) = many::open(&mut buffer, &rows(()).collect::<Vec<_>>()) {
        assert!(found.iter().flatten().all(|text| text.end <= buffer.len()));
    }
    let sealed: Vec<_> = rows(()).zip(0..).map(|(row, counter)| (row, 1, counter)).collect();
    if many::seal(&mut buffer, &sealed).is_ok() {
        let found = many::open(&mut buffer, &rows(()).collect::<Vec<_>>()).unwrap();
        assert!(found.iter().all(|text| text.is_some()));
    }
    many::controls(case.frame);
});
