//! Packets that are lost, late, overtaken, or do not pass for a second: nothing but time changes.

use std::time::Duration;

use super::{Dice, local};
use crate::processes::{Worker, paint, picture, succeeds};
use crate::udp_proxy::{Blackout, Faults, UdpProxy};

/// How much of the weights has to cross the network as well.
#[derive(Clone, Copy, PartialEq)]
enum Upload {
    All,
    Some,
}

/// A picture across a network with such faults: how many packets came.
fn check(faults: Faults, upload: Upload) -> u64 {
    let folder = tempfile::tempdir().unwrap();
    let expected = local(folder.path(), &[]);
    let worker = Worker::start();
    if upload == Upload::Some {
        let output = folder.path().join("before.png");
        succeeds(&paint("tiny", &worker.url, &output, &[]));
        let mut files: Vec<_> = worker.cache().read_dir().unwrap().map(Result::unwrap).collect();
        files.sort_by_key(|file| (file.metadata().unwrap().len(), file.file_name()));
        for file in files.iter().step_by(2).take(20) {
            std::fs::remove_file(file.path()).unwrap();
        }
    }
    let proxy = UdpProxy::start(worker.address(), faults);
    let there = folder.path().join("there.png");
    succeeds(&paint("tiny", &worker.url_at(proxy.address()), &there, &[]));
    assert!(picture(&there) == expected, "another picture");
    assert_eq!(proxy.lost() > 0, faults.loss > 0.0 || faults.blackout.is_some());
    proxy.packets()
}

/// As TCP would, QUIC gets some 16 kB/s through such a network: all weights would take minutes.
fn check_loss_and_delay(dice: &mut Dice, upload: Upload) {
    let delay = Duration::from_millis(200);
    let seed = dice.between(0, 1 << 40);
    check(Faults { loss: 0.05, reorder: 0.1, delay, seed, blackout: None }, upload);
}

fn check_blackout(dice: &mut Dice, packets: u64) {
    let from_packet = dice.between(1, packets / 2);
    let blackout = Some(Blackout { from_packet, lasts: Duration::from_secs(1) });
    println!("blackout from packet {from_packet} of about {packets}");
    check(Faults { blackout, ..Faults::default() }, Upload::All);
}

#[test]
fn loss_and_reordering_and_delay_change_nothing_but_time() {
    Dice::some(1).for_each(|mut dice| check_loss_and_delay(&mut dice, Upload::Some));
}

#[test]
fn a_second_without_a_packet_changes_nothing_but_time() {
    let packets = check(Faults::default(), Upload::All);
    Dice::some(2).for_each(|mut dice| check_blackout(&mut dice, packets));
}

#[test]
#[ignore = "minutes: scripts/faults"]
fn many_bad_networks_change_nothing_but_time() {
    let packets = check(Faults::default(), Upload::All);
    for mut dice in Dice::many() {
        check_loss_and_delay(&mut dice, Upload::All);
        check_blackout(&mut dice, packets);
    }
}
