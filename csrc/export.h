#pragma once

// What of libmylayers.so others may call, mylayers._C among them; all else is hidden.
#define MYLAYERS_API __attribute__((visibility("default")))
