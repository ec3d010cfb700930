use super::*;
use std::cell::RefCell;
use std::rc::Rc;

/// A disk whose requests end some time after it was held first, and what happened to it.
struct Made {
    needs: Result<Duration, NotHeld>,
    since: RefCell<Option<Instant>>,
    events: Rc<RefCell<Vec<String>>>,
    name: &'static str,
}

struct Wait {
    until: Instant,
    refuses: Option<NotHeld>,
}

impl Waiting for Wait {
    fn wait(&mut self, deadline: Instant) -> Result<(), NotHeld> {
        match self.refuses {
            Some(why) => Err(why),
            None if self.until <= deadline => Ok(()),
            None => Err(NotHeld::Late),
        }
    }
}

impl Holdable for Made {
    type Waiting = Wait;

    fn begin(&self) -> Wait {
        self.events.borrow_mut().push(format!("hold {}", self.name));
        let since = *self.since.borrow_mut().get_or_insert_with(Instant::now);
        Wait {
            until: since + self.needs.unwrap_or_default(),
            refuses: self.needs.err(),
        }
    }

    fn let_go(&self) {
        self.events
            .borrow_mut()
            .push(format!("release {}", self.name));
    }
}

const NAMES: [&str; 3] = ["a", "b", "c"];

/// Three disks that need this long, and what happens to them.
fn made(needs: [Result<Duration, NotHeld>; 3]) -> (Vec<Made>, Rc<RefCell<Vec<String>>>) {
    let events = Rc::new(RefCell::new(Vec::new()));
    let disks = needs.into_iter().zip(NAMES).map(|(needs, name)| Made {
        needs,
        name,
        since: RefCell::default(),
        events: Rc::clone(&events),
    });
    (disks.collect(), events)
}

/// What three disks go through that need this long, and had requests for this long: the events, and whether all are still.
fn run(
    needs: [Result<Duration, NotHeld>; 3],
    oldest_ms: [u64; 3],
) -> (Vec<String>, Result<(), Restless>) {
    let (disks, events) = made(needs);
    let oldest = oldest_ms.map(Duration::from_millis);
    let disks: Vec<&Made> = disks.iter().collect();
    // Nothing here waits.
    let deadline = Instant::now() + Duration::from_secs(60);
    let outcome = hold_still(&disks, &oldest, deadline).map(drop);
    (events.take(), outcome)
}

const NOTHING: Result<Duration, NotHeld> = Ok(Duration::ZERO);
const SLOW: Result<Duration, NotHeld> = Ok(Duration::from_secs(30));
const FOREVER: Result<Duration, NotHeld> = Ok(Duration::from_secs(600));

#[test]
fn disks_that_are_soon_still_are_held_together() {
    let (events, outcome) = run([NOTHING; 3], [0, 10, 100]);
    assert_eq!(events, ["hold a", "hold b", "hold c"]);
    assert_eq!(outcome, Ok(()));
}

#[test]
fn others_are_not_held_before_a_disk_with_an_old_request_is_still() {
    let (events, outcome) = run([NOTHING, SLOW, NOTHING], [0, 1000, 0]);
    assert_eq!(events, ["hold b", "hold a", "hold c"]);
    assert_eq!(outcome, Ok(()));
    let (events, outcome) = run([NOTHING, FOREVER, NOTHING], [0, 1000, 0]);
    assert_eq!(events, ["hold b"], "the others notice nothing");
    assert_eq!(outcome, Err((1, NotHeld::Late)));
}

#[test]
fn others_go_on_while_a_disk_that_turns_out_to_be_slow_is_waited_for() {
    let first = ["hold a", "hold b", "hold c", "release a", "release c"];
    let (events, outcome) = run([NOTHING, SLOW, NOTHING], [0; 3]);
    assert_eq!(events, [&first[..], &["hold a", "hold c"]].concat());
    assert_eq!(outcome, Ok(()));
    let (events, outcome) = run([NOTHING, FOREVER, NOTHING], [0; 3]);
    assert_eq!(events, first);
    assert_eq!(outcome, Err((1, NotHeld::Late)));
}

#[test]
fn a_disk_that_waits_after_an_error_is_named_at_once() {
    let held = Err(NotHeld::AfterError);
    let (_, outcome) = run([SLOW, held, NOTHING], [0; 3]);
    assert_eq!(outcome, Err((1, NotHeld::AfterError)));
}

#[test]
fn a_disk_that_went_on_meanwhile_has_waited_since_it_was_held_last() {
    let (disks, _) = made([NOTHING, SLOW, NOTHING]);
    let disks: Vec<&Made> = disks.iter().collect();
    let deadline = Instant::now() + Duration::from_secs(60);
    let still = hold_still(&disks, &[Duration::ZERO; 3], deadline).unwrap();
    let held_first = |at: usize| disks[at].since.borrow().expect("it was held");
    assert!(still[0].since > held_first(0) && still[2].since > held_first(2));
    assert!(still[1].since <= held_first(1), "it was held all the time");
}
