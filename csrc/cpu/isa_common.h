// Shapes of the tiles for one instruction set; an instruction-set file overrides what differs.
#pragma once

#ifndef MMFAST_TILE_ROWS
#define MMFAST_TILE_ROWS 6
#endif
#ifndef MMFAST_TILE_VECTORS
#define MMFAST_TILE_VECTORS 4
#endif
#ifndef MMFAST_FWD_ROWS
#define MMFAST_FWD_ROWS 192
#endif
#ifndef MMFAST_FWD_KEYS
#define MMFAST_FWD_KEYS 144
#endif
#ifndef MMFAST_FWD_STRIP
#define MMFAST_FWD_STRIP 48
#endif
#ifndef MMFAST_BWD_ROWS
#define MMFAST_BWD_ROWS 48
#endif
