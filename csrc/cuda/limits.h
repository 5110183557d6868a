// What the driver says of a device, for launchers to choose by.
#pragma once
#include "stream.h"

namespace mmfast {

// Fills in sms, capability and shared_optin of `stream.device`; the driver is asked once for each
// device.
void read_limits(Stream& stream);

}  // namespace mmfast
