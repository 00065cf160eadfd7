//! The program's allocator: jemalloc, told to give memory back.
//!
//! After a peak of sessions the memory shall return to the system within seconds. glibc keeps it for good, and so does
//! jemalloc as it comes (`benches/` measures all of them): what does it is a thread that returns unused pages after one
//! second. Each thread keeps freed objects for itself, by itself up to two hundred of each size; a worker that has nothing to
//! do never gives them up. That is the same for any number of sessions, some 300 kB, but over a thousand of them it is a
//! quarter of all they keep; ten of a size serve a login as well. The setting must be a symbol that jemalloc finds at its start, before any code of ours runs, which takes the
//! one unsafe attribute of this crate: the name is jemalloc's, and the value is a C string. The feature of unprefixed names makes
//! the crypto provider's C code use the same allocator. Only the program has this; the library leaves the choice to its user.

use tikv_jemallocator::Jemalloc;

#[global_allocator]
static ALLOCATOR: Jemalloc = Jemalloc;

/// Read by jemalloc: `const char *malloc_conf`.
#[expect(unsafe_code, reason = "a symbol for C; no other of that name exists, for jemalloc's own is weak")]
#[unsafe(export_name = "malloc_conf")]
pub(crate) static SETTINGS: &[u8; 113] =
    b"background_thread:true,dirty_decay_ms:1000,muzzy_decay_ms:0,tcache_nslots_small_min:4,tcache_nslots_small_max:10\0";
