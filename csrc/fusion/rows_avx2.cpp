// The loops of rows.h for AVX2, FMA and F16C.
#include "fusion/rows_common.h"

namespace sphinx::fusion {

const Rows& rows_avx2() {
  static const Rows rows = make_rows<Eight>();
  return rows;
}

}  // namespace sphinx::fusion
