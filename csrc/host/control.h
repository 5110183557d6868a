// The device that the host run pretends to have, for the bindings that fill in a Stream.
#pragma once
#include "../cuda/stream.h"

namespace mmfast::host {

Stream pretended_stream();

}  // namespace mmfast::host
