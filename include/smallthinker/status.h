/* Status codes of the C core. Functions that can fail return 0 or one of these negative values;
 * the Cython layer turns them into the exceptions of errors.py. */
#ifndef SMALLTHINKER_STATUS_H
#define SMALLTHINKER_STATUS_H

typedef enum st_status {
    ST_OK = 0,
    ST_ERR_MEMORY = -1,      /* an allocation failed */
    ST_ERR_UNSUPPORTED = -2, /* this CPU or build cannot do what was asked */
    ST_ERR_ARGUMENT = -3,    /* a value is outside its contract */
    ST_ERR_IO = -4           /* a read failed or came back short */
} st_status;

#endif
