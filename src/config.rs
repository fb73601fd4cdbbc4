//! Settings of the server and engine, parsed and checked once.
