use std::io::{BufRead, BufReader, PipeReader, Read};

use super::*;

/// A queue before a pipe.
fn queue() -> (Queue, PipeReader) {
    let (reader, writer) = io::pipe().unwrap();
    let queue = Queue::new(writer, Arc::default());
    queue.start().unwrap();
    (queue, reader)
}

#[test]
fn lines_arrive_in_order_and_settling_waits_for_them() {
    let (queue, mut reader) = queue();
    for line in 0..500 {
        queue.put(format!("{line}\n").as_bytes());
    }
    queue.settle(Duration::from_secs(60));
    drop(queue);
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    let lines: Vec<usize> = text.lines().map(|line| line.parse().unwrap()).collect();
    assert_eq!(lines, (0..500).collect::<Vec<_>>());
}

#[test]
fn lines_can_be_written_before_the_thread_starts_and_a_full_stream_is_not_waited_for() {
    let (mut reader, writer) = io::pipe().unwrap();
    let queue = Queue::new(writer, Arc::default());
    queue.put(b"early\n");
    queue.write_early();
    let mut text = [0; 6];
    reader.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"early\n");
    for _ in 0..MAX_LINES {
        queue.put(&[b'x'; 200]);
    }
    queue.write_early();
    assert!(queue.account.bytes.load(Ordering::Relaxed) > 0, "some wait");
}

#[test]
fn what_does_not_fit_is_counted_and_told_when_there_is_room() {
    let (queue, reader) = queue();
    // Nothing is read: the pipe fills, then the queue, by bytes or by lines.
    for round in [1000, 1] {
        let line = format!("{}\n", "x".repeat(round));
        for _ in 0..3 * MAX_LINES {
            queue.put(line.as_bytes());
        }
    }
    assert!(queue.account.bytes.load(Ordering::Relaxed) <= MAX_BYTES);
    queue.settle(Duration::from_millis(20));
    let mut lines = BufReader::new(reader).lines().map(|line| line.unwrap());
    let mut written = 0;
    let told = lines.find(|line| {
        written += 1;
        line.contains("log lines were lost")
    });
    let lost: usize = told.unwrap().split(' ').nth(2).unwrap().parse().unwrap();
    assert_eq!(lost + written - 1, 6 * MAX_LINES);
    queue.put(b"after\n");
    assert_eq!(lines.next().unwrap(), "after");
}

#[test]
fn a_line_that_cannot_be_written_is_lost_and_the_next_ones_are_not() {
    let (reader, writer) = io::pipe().unwrap();
    let queue = Queue::new(writer, Arc::default());
    queue.start().unwrap();
    drop(reader);
    queue.put(b"to nobody\n");
    queue.settle(Duration::from_secs(60));
    assert_eq!(queue.account.lost.load(Ordering::Relaxed), 1);
    assert_eq!(queue.account.bytes.load(Ordering::Relaxed), 0);
}

#[test]
fn lines_left_out_are_told_though_no_line_follows() {
    let (reader, writer) = io::pipe().unwrap();
    let limits = Arc::new(Limits::default());
    let queue = Queue::new(writer, Arc::clone(&limits));
    queue.start().unwrap();
    let now = Instant::now();
    while limits.admit(Source::Disk(5), now) == super::super::limit::Verdict::Write {}
    queue.put(b"");
    let mut lines = BufReader::new(reader).lines();
    assert_eq!(
        lines.next().unwrap().unwrap(),
        "[WARN ] disk @5: 1 log lines were left out, there were more than 10 a second"
    );
}

#[test]
fn lines_wait_until_the_writer_is_started_or_the_end() {
    let (reader, writer) = io::pipe().unwrap();
    let queue = Queue::new(writer, Arc::default());
    queue.put(b"early\n");
    assert_eq!(*queue.account.left(), 0);
    queue.settle(Duration::from_secs(60));
    let mut lines = BufReader::new(reader).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "early");
    queue.start().unwrap();
}

/// As where the process may have no other thread: nothing comes to take the writer.
#[test]
fn lines_are_written_by_the_end_itself_if_no_thread_can_be_started() {
    let (reader, writer) = io::pipe().unwrap();
    let queue = Queue::new(writer, Arc::default());
    queue.put(b"why it ends\n");
    queue.write_here();
    assert_eq!(*queue.account.left(), 1);
    queue.settle(Duration::from_secs(60));
    let mut lines = BufReader::new(reader).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "why it ends");
}
