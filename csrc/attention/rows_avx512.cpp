// The loops of rows.h for AVX-512 (F, BW, DQ, VL).
#include "attention/rows_common.h"

namespace sphinx::attention {

const Rows& rows_avx512() {
  static const Rows rows = make_rows<Sixteen>();
  return rows;
}

}  // namespace sphinx::attention
