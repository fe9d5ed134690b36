// The constants of an int8 product, checked when the session is created.
#pragma once

#include "int8_form.h"
#include "int8_weights.h"
#include "node_inputs.h"

namespace vitoats {

// in_features is the attribute with the number of columns.
Int8Constants checked_int8_constants(const NodeInputs& inputs, const Int8Form& form, const char* in_features = "in_features");

void check_count(const NodeInputs& inputs, size_t expected);

}  // namespace vitoats
