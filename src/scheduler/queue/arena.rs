//! Objects by typed numbers, which are never given twice.
//!
//! 1. A number of an object that is gone finds nothing, or panics where an object is expected: an
//!    object that another one names must be there.
//! 2. Objects never move, so that no insertion takes long, however many there are. (slotmap's are in one
//!    vector, which is copied when it grows: a tenth of a second at a million tasks.)

use std::{
    marker::PhantomData,
    ops::{Index, IndexMut},
};

/// Objects of one chunk.
const CHUNK_LENGTH: usize = 256;

/// A number of one kind of object.
pub(super) trait Number: Copy {
    fn new(index: u32, generation: u32) -> Self;
    fn index(self) -> u32;
    fn generation(self) -> u32;
}

macro_rules! numbers {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub(in crate::scheduler::queue) struct $name {
            index: u32,
            generation: u32,
        }

        impl Number for $name {
            fn new(index: u32, generation: u32) -> Self {
                $name { index, generation }
            }
            fn index(self) -> u32 {
                self.index
            }
            fn generation(self) -> u32 {
                self.generation
            }
        }
    )*};
}

numbers! {
    /// Of a platform queue.
    PlatformQueueNumber,
    /// Of a size-class queue.
    QueueNumber,
    /// Of a node of an invocation tree.
    InvocationNumber,
    /// Of a task.
    TaskNumber,
    /// Of an operation.
    OperationNumber,
    /// Of a worker.
    WorkerNumber,
}

struct ArenaSlot<V> {
    generation: u32,
    value: Result<V, Option<u32>>,
}

/// Objects of one kind.
pub(super) struct Arena<K, V> {
    chunks: Vec<Vec<ArenaSlot<V>>>,
    /// The first free slot; each names the next one.
    free: Option<u32>,
    len: usize,
    number: PhantomData<K>,
}

impl<K, V> Default for Arena<K, V> {
    fn default() -> Self {
        Arena {
            chunks: Vec::new(),
            free: None,
            len: 0,
            number: PhantomData,
        }
    }
}

impl<K: Number, V> Arena<K, V> {
    fn slot(&self, index: u32) -> Option<&ArenaSlot<V>> {
        let index = index as usize;
        self.chunks
            .get(index / CHUNK_LENGTH)?
            .get(index % CHUNK_LENGTH)
    }

    fn slot_mut(&mut self, index: u32) -> Option<&mut ArenaSlot<V>> {
        let index = index as usize;
        self.chunks
            .get_mut(index / CHUNK_LENGTH)?
            .get_mut(index % CHUNK_LENGTH)
    }

    pub(super) fn insert(&mut self, value: V) -> K {
        self.len += 1;
        if let Some(index) = self.free
            && let Some(slot) = self.slot_mut(index)
        {
            let generation = slot.generation;
            let Err(next) = slot.value else {
                unreachable!("a free slot is taken")
            };
            slot.value = Ok(value);
            self.free = next;
            return K::new(index, generation);
        }
        if self
            .chunks
            .last()
            .is_none_or(|chunk| chunk.len() == CHUNK_LENGTH)
        {
            self.chunks.push(Vec::with_capacity(CHUNK_LENGTH));
        }
        let full = (self.chunks.len() - 1) * CHUNK_LENGTH;
        let Some(chunk) = self.chunks.last_mut() else {
            unreachable!("a chunk was pushed");
        };
        let index = (full + chunk.len()) as u32;
        chunk.push(ArenaSlot {
            generation: 0,
            value: Ok(value),
        });
        K::new(index, 0)
    }

    pub(super) fn get(&self, number: K) -> Option<&V> {
        let slot = self.slot(number.index())?;
        let value = slot.value.as_ref().ok()?;
        (slot.generation == number.generation()).then_some(value)
    }

    /// The object, which is not there any more. Panics where it is not now.
    pub(super) fn remove(&mut self, number: K) -> V {
        let free = self.free;
        let taken = match self.slot_mut(number.index()) {
            Some(slot) if slot.generation == number.generation() && slot.value.is_ok() => {
                slot.generation = slot.generation.wrapping_add(1);
                std::mem::replace(&mut slot.value, Err(free)).ok()
            }
            _ => None,
        };
        self.free = Some(number.index());
        self.len -= 1;
        taken.unwrap_or_else(|| dangling::<V>())
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (K, &V)> {
        let slots = self.chunks.iter().flatten().enumerate();
        slots.filter_map(|(index, slot)| {
            let value = slot.value.as_ref().ok()?;
            Some((K::new(index as u32, slot.generation), value))
        })
    }

    /// The objects in some places from this one on, and the place after them if there are more.
    pub(super) fn piece(&self, from: usize, places: usize) -> (Vec<K>, Option<usize>) {
        let end = from.saturating_add(places);
        let numbers = (from..end).filter_map(|index| {
            let slot = self.slot(u32::try_from(index).ok()?)?;
            slot.value.as_ref().ok()?;
            Some(K::new(index as u32, slot.generation))
        });
        let all = self.chunks.len() * CHUNK_LENGTH;
        (numbers.collect(), (end < all).then_some(end))
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }
}

#[cold]
fn dangling<V>() -> ! {
    panic!(
        "the queue names something that is gone: {}",
        std::any::type_name::<V>()
    )
}

impl<K: Number, V> Index<K> for Arena<K, V> {
    type Output = V;

    fn index(&self, number: K) -> &V {
        self.get(number).unwrap_or_else(|| dangling::<V>())
    }
}

impl<K: Number, V> IndexMut<K> for Arena<K, V> {
    fn index_mut(&mut self, number: K) -> &mut V {
        match self.slot_mut(number.index()) {
            Some(ArenaSlot {
                generation,
                value: Ok(value),
            }) if *generation == number.generation() => value,
            _ => dangling::<V>(),
        }
    }
}
