// The loops of rows.h for AVX2, FMA and F16C.
#include "attention/rows_common.h"

namespace sphinx::attention {

const Rows& rows_avx2() {
  static const Rows rows = make_rows<Eight>();
  return rows;
}

}  // namespace sphinx::attention
