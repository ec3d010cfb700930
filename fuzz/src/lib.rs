//! What the fuzz targets share: a guest's memory, and the wire format of vhost-user as a front end
//! writes it, written again here so that the two cannot be wrong together.

pub mod guest;
pub mod wire;
