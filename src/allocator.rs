//! The allocator of the program: jemalloc, configured to return freed memory to the system.
//!
//! After a peak of sessions the memory is returned within seconds. glibc never returns it, and neither does jemalloc by default
//! (`benches/` measures them): a background thread must return unused pages, here after one second. Each thread also caches freed
//! objects, by default up to two hundred of each size, and an idle worker never releases them. That is about 300 kB regardless of
//! the number of sessions, but for a thousand sessions it is a quarter of all memory; ten objects of a size serve a login as well.
//!
//! jemalloc reads the setting from a symbol before any code of the program runs. This needs the only unsafe attribute of this
//! crate: the name is jemalloc's, and the value is a C string. With unprefixed names the C code of the crypto provider uses the same
//! allocator. The library does not choose an allocator.

use tikv_jemallocator::Jemalloc;

#[global_allocator]
static ALLOCATOR: Jemalloc = Jemalloc;

/// jemalloc reads this symbol as `const char *malloc_conf`.
#[expect(unsafe_code, reason = "a symbol for C; it is the only one of this name, because jemalloc's own is weak")]
#[unsafe(export_name = "malloc_conf")]
pub(crate) static SETTINGS: &[u8; 113] =
    b"background_thread:true,dirty_decay_ms:1000,muzzy_decay_ms:0,tcache_nslots_small_min:4,tcache_nslots_small_max:10\0";
